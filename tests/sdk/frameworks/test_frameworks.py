"""LiveKit's and Pipecat's clients of ElevenLabs through Keychoir: a session works, whichever keys refuse it."""

import asyncio
import ssl

import aiohttp
import pytest
from livekit import rtc
from livekit.plugins import elevenlabs
from pipecat.frames.frames import (
    EndFrame,
    ErrorFrame,
    InputAudioRawFrame,
    TranscriptionFrame,
    TTSAudioRawFrame,
    TTSSpeakFrame,
    TTSStoppedFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.services.elevenlabs.dialogue.tts import ElevenLabsDialogueTTSService
from pipecat.services.elevenlabs.stt import ElevenLabsRealtimeSTTService
from pipecat.services.elevenlabs.tts import ElevenLabsTTSService
from pipecat.workers.runner import WorkerRunner

from sessions import CLIENT_TOKEN, SECRET

VOICE = "21m00Tcm4TlvDq8ikWAM"
MODEL = "eleven_flash_v2_5"
TEXT = "The quick brown fox jumps over the lazy dog."
RATE = 16_000
# A second of silence.
SECOND = bytes(2 * RATE)
WAIT_MAX_S = 30

SPEECH = f"/v1/text-to-speech/{VOICE}/multi-stream-input?"
DIALOGUE = "/v1/text-to-dialogue/multi-stream-input?"
SCRIBE = "/v1/speech-to-text/realtime?"


def within_time(main):
    return asyncio.run(asyncio.wait_for(main, WAIT_MAX_S))


def http():
    """A session as a shell that has taken `keychoir env` starts it: aiohttp looks for authorities at its import alone."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=ssl.create_default_context()))


async def livekit_speaks(line, model, texts):
    """Samples of each text, all spoken on one connection."""
    async with http() as session:
        speech = elevenlabs.TTS(
            api_key=CLIENT_TOKEN,
            base_url=f"{line.http}/v1",
            voice_id=VOICE,
            model=model,
            encoding=f"pcm_{RATE}",
            http_session=session,
        )
        samples = []
        for text in texts:
            async with speech.stream() as stream:
                stream.push_text(text)
                stream.end_input()
                samples.append(sum([audio.frame.samples_per_channel async for audio in stream]))
        await speech.aclose()
        return samples


@pytest.mark.parametrize(("model", "path"), [(MODEL, SPEECH), ("eleven_v3", DIALOGUE)], ids=["speech", "dialogue"])
def test_livekit_speaks(line, model, path):
    assert all(within_time(livekit_speaks(line, model, [TEXT, "And again."])))
    assert line.check(path)["spoken"].split() == f"{TEXT} And again.".split()


async def livekit_listens(line):
    async with http() as session:
        ear = elevenlabs.STT(
            api_key=CLIENT_TOKEN, base_url=f"{line.http}/v1", model="scribe_v2_realtime", http_session=session
        )
        async with ear.stream() as stream:
            stream.push_frame(rtc.AudioFrame(SECOND, RATE, 1, RATE))
            stream.flush()
            async for event in stream:
                if event.type is elevenlabs.stt.SpeechEventType.FINAL_TRANSCRIPT:
                    return event.alternatives[0].text


def test_livekit_listens(line):
    assert within_time(livekit_listens(line))
    line.check(SCRIBE)


class Listener(FrameProcessor):
    """Keeps what comes out of a service, and says when the frame that is waited for has come."""

    def __init__(self, wanted):
        super().__init__()
        self._wanted = wanted
        self.came = asyncio.Event()
        self.frames = []

    async def process_frame(self, frame, direction):
        await super().process_frame(frame, direction)
        self.frames.append(frame)
        if isinstance(frame, (self._wanted, ErrorFrame)):
            self.came.set()
        await self.push_frame(frame, direction)


async def pipecat_runs(service, frames, wanted):
    """What a pipeline makes of these frames; it ends when the frame that is waited for has come."""
    before, behind = Listener(ErrorFrame), Listener(wanted)
    worker = PipelineWorker(
        Pipeline([before, service, behind]),
        params=PipelineParams(audio_in_sample_rate=RATE, audio_out_sample_rate=RATE),
        cancel_on_idle_timeout=False,
    )
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)

    async def drive():
        await worker.queue_frames(frames)
        waiting = [asyncio.create_task(listener.came.wait()) for listener in (before, behind)]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        await worker.queue_frame(EndFrame())

    await asyncio.gather(runner.run(), drive())
    errors = [frame for frame in before.frames + behind.frames if isinstance(frame, ErrorFrame)]
    assert errors == []
    return [frame for frame in behind.frames if isinstance(frame, (TTSAudioRawFrame, TranscriptionFrame))]


@pytest.mark.parametrize(
    ("service", "model", "path"),
    [(ElevenLabsTTSService, MODEL, SPEECH), (ElevenLabsDialogueTTSService, "eleven_v4_turbo", DIALOGUE)],
    ids=["speech", "dialogue"],
)
def test_pipecat_speaks(line, service, model, path):
    async def main():
        settings = service.Settings(voice=VOICE, model=model)
        speech = service(api_key=CLIENT_TOKEN, url=line.ws, sample_rate=RATE, settings=settings)
        return await pipecat_runs(speech, [TTSSpeakFrame(TEXT)], TTSStoppedFrame)

    assert sum(len(frame.audio) for frame in within_time(main())) > 0
    assert line.check(path)["spoken"].strip() == TEXT


# It takes a host alone and knows wss alone.
@pytest.mark.parametrize("line", SECRET, indirect=True, ids=" ".join)
def test_pipecat_listens(line):
    async def main():
        ear = ElevenLabsRealtimeSTTService(api_key=CLIENT_TOKEN, base_url=line.host, sample_rate=RATE)
        frames = [InputAudioRawFrame(SECOND, RATE, 1), VADUserStoppedSpeakingFrame()]
        return await pipecat_runs(ear, frames, TranscriptionFrame)

    assert [bool(frame.text) for frame in within_time(main())] == [True]
    line.check(SCRIBE)
