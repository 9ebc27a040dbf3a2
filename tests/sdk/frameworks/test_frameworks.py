"""Tests that the voice frameworks LiveKit and Pipecat synthesize speech, also with dialogue models, and transcribe
audio through Keychoir over WebSockets. The first two keys serve, or the provider refuses them as invalid, exhausted or
busy (at their concurrency limit)."""

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

from sessions import CLIENT_TOKEN, WSS_CASES

VOICE = "21m00Tcm4TlvDq8ikWAM"
MODEL = "eleven_flash_v2_5"
TEXT = "The quick brown fox jumps over the lazy dog."
SAMPLE_RATE = 16_000
SILENT_SECOND = bytes(2 * SAMPLE_RATE)
TIMEOUT_SECONDS = 30

SPEECH_PATH = f"/v1/text-to-speech/{VOICE}/multi-stream-input?"
DIALOGUE_PATH = "/v1/text-to-dialogue/multi-stream-input?"
TRANSCRIPTION_PATH = "/v1/speech-to-text/realtime?"


def run_within_timeout(coroutine):
    """Runs a coroutine, which must end within TIMEOUT_SECONDS. Returns its result."""
    return asyncio.run(asyncio.wait_for(coroutine, TIMEOUT_SECONDS))


def http_session():
    """Returns an HTTP session that trusts the CA certificates in SSL_CERT_FILE. aiohttp itself reads this variable only
    when it is imported."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=ssl.create_default_context()))


async def speak_with_livekit(session_environment, model, texts):
    """Synthesizes the texts on one connection. Returns the number of audio samples of each text."""
    async with http_session() as session:
        speech = elevenlabs.TTS(
            api_key=CLIENT_TOKEN,
            base_url=f"{session_environment.http}/v1",
            voice_id=VOICE,
            model=model,
            encoding=f"pcm_{SAMPLE_RATE}",
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


@pytest.mark.parametrize(
    ("model", "path"), [(MODEL, SPEECH_PATH), ("eleven_v3", DIALOGUE_PATH)], ids=["speech", "dialogue"]
)
def test_livekit_synthesizes_speech(session_environment, model, path):
    assert all(run_within_timeout(speak_with_livekit(session_environment, model, [TEXT, "And again."])))
    assert session_environment.check_sessions(path)["spoken"].split() == f"{TEXT} And again.".split()


async def transcribe_with_livekit(session_environment):
    """Returns the transcript of a second of silence."""
    async with http_session() as session:
        transcriber = elevenlabs.STT(
            api_key=CLIENT_TOKEN,
            base_url=f"{session_environment.http}/v1",
            model="scribe_v2_realtime",
            http_session=session,
        )
        async with transcriber.stream() as stream:
            stream.push_frame(rtc.AudioFrame(SILENT_SECOND, SAMPLE_RATE, 1, SAMPLE_RATE))
            stream.flush()
            async for event in stream:
                if event.type is elevenlabs.stt.SpeechEventType.FINAL_TRANSCRIPT:
                    return event.alternatives[0].text


def test_livekit_transcribes_audio(session_environment):
    assert run_within_timeout(transcribe_with_livekit(session_environment))
    session_environment.check_sessions(TRANSCRIPTION_PATH)


class FrameRecorder(FrameProcessor):
    """Records the frames of a pipeline. Sets an event at the first frame that has the expected type or is an error."""

    def __init__(self, expected_type):
        super().__init__()
        self._expected_type = expected_type
        self.received_expected = asyncio.Event()
        self.frames = []

    async def process_frame(self, frame, direction):
        await super().process_frame(frame, direction)
        self.frames.append(frame)
        if isinstance(frame, (self._expected_type, ErrorFrame)):
            self.received_expected.set()
        await self.push_frame(frame, direction)


async def run_pipecat(service, frames, expected_type):
    """Runs a pipeline with `frames` until `service` emits a frame of the expected type or an error, which fails the
    test. Returns the audio and transcription frames."""
    before_service, after_service = FrameRecorder(ErrorFrame), FrameRecorder(expected_type)
    worker = PipelineWorker(
        Pipeline([before_service, service, after_service]),
        params=PipelineParams(audio_in_sample_rate=SAMPLE_RATE, audio_out_sample_rate=SAMPLE_RATE),
        cancel_on_idle_timeout=False,
    )
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)

    async def send_frames():
        await worker.queue_frames(frames)
        recorders = (before_service, after_service)
        tasks = [asyncio.create_task(recorder.received_expected.wait()) for recorder in recorders]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await worker.queue_frame(EndFrame())

    await asyncio.gather(runner.run(), send_frames())
    errors = [frame for frame in before_service.frames + after_service.frames if isinstance(frame, ErrorFrame)]
    assert errors == []
    return [frame for frame in after_service.frames if isinstance(frame, (TTSAudioRawFrame, TranscriptionFrame))]


@pytest.mark.parametrize(
    ("service", "model", "path"),
    [(ElevenLabsTTSService, MODEL, SPEECH_PATH), (ElevenLabsDialogueTTSService, "eleven_v4_turbo", DIALOGUE_PATH)],
    ids=["speech", "dialogue"],
)
def test_pipecat_synthesizes_speech(session_environment, service, model, path):
    async def main():
        settings = service.Settings(voice=VOICE, model=model)
        speech = service(api_key=CLIENT_TOKEN, url=session_environment.ws, sample_rate=SAMPLE_RATE, settings=settings)
        return await run_pipecat(speech, [TTSSpeakFrame(TEXT)], TTSStoppedFrame)

    assert sum(len(frame.audio) for frame in run_within_timeout(main())) > 0
    assert session_environment.check_sessions(path)["spoken"].strip() == TEXT


# This service of Pipecat accepts only a host name, and always uses wss.
@pytest.mark.parametrize("session_environment", WSS_CASES, indirect=True, ids=" ".join)
def test_pipecat_transcribes_audio(session_environment):
    async def main():
        transcriber = ElevenLabsRealtimeSTTService(
            api_key=CLIENT_TOKEN, base_url=session_environment.host, sample_rate=SAMPLE_RATE
        )
        frames = [InputAudioRawFrame(SILENT_SECOND, SAMPLE_RATE, 1), VADUserStoppedSpeakingFrame()]
        return await run_pipecat(transcriber, frames, TranscriptionFrame)

    assert [bool(frame.text) for frame in run_within_timeout(main())] == [True]
    session_environment.check_sessions(TRANSCRIPTION_PATH)
