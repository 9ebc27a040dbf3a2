"""Tests WebSocket sessions of the official Python SDK through Keychoir: speech, transcription and conversations, also
with single-use tokens and signed URLs. The first two keys serve, or the provider refuses them as invalid, exhausted or
busy (at their concurrency limit). Also tests that no form of the client credential reaches the provider."""

import asyncio
import base64
import contextlib
import json
import queue
import threading

import pytest
import websockets
from elevenlabs import ElevenLabs
from elevenlabs.conversational_ai.conversation import AudioInterface, Conversation
from elevenlabs.realtime import AudioFormat, RealtimeEvents

from sessions import CLIENT_TOKEN, WS_CASES, WSS_CASES
from test_sdk import MODEL, TEXT, VOICE, is_mp3

AGENT = "agent_of_the_simulator"
SPEECH_PATH = f"/v1/text-to-speech/{VOICE}/stream-input?"
TRANSCRIPTION_PATH = "/v1/speech-to-text/realtime?"
CONVERSATION_PATH = "/v1/convai/conversation?"
TIMEOUT_SECONDS = 30
# A second of silence, with 16,000 samples of two bytes.
SILENT_SECOND = bytes(32_000)


def create_client(session_environment):
    return ElevenLabs(base_url=session_environment.http, api_key=CLIENT_TOKEN)


# The SDK always uses wss for this call.
@pytest.mark.parametrize("session_environment", WSS_CASES, indirect=True, ids=" ".join)
def test_streamed_text_is_synthesized(session_environment):
    words = (f"{word} " for word in TEXT.split())
    spoken = create_client(session_environment).text_to_speech.convert_realtime(VOICE, text=words, model_id=MODEL)
    assert is_mp3(b"".join(spoken))
    assert session_environment.check_sessions(SPEECH_PATH)["spoken"].split() == TEXT.split()


async def transcribe(client, **options):
    """Returns the transcript of a second of silence."""
    connection = await client.speech_to_text.realtime.connect(
        {"model_id": "scribe_v2_realtime", "audio_format": AudioFormat.PCM_16000, "sample_rate": 16_000, **options}
    )
    committed = asyncio.get_running_loop().create_future()
    ended = asyncio.Event()
    events = []

    def record_error(event):
        events.append(event)
        if not committed.done():
            committed.set_exception(AssertionError(event))

    connection.on(RealtimeEvents.SESSION_STARTED, events.append)
    connection.on(RealtimeEvents.COMMITTED_TRANSCRIPT, committed.set_result)
    connection.on(RealtimeEvents.ERROR, record_error)
    connection.on(RealtimeEvents.CLOSE, ended.set)
    await connection.send({"audio_base_64": base64.b64encode(SILENT_SECOND).decode()})
    await connection.commit()
    try:
        transcript = await asyncio.wait_for(committed, TIMEOUT_SECONDS)
    finally:
        await connection.close()
        await asyncio.wait_for(ended.wait(), TIMEOUT_SECONDS)
    assert [event["message_type"] for event in events] == ["session_started"]
    return transcript["text"]


def test_streamed_audio_is_transcribed(session_environment):
    assert asyncio.run(transcribe(create_client(session_environment), keyterms=["one term", "another"]))
    assert session_environment.sessions()[-1]["path_and_query"].endswith("keyterms=one%20term&keyterms=another")
    session = session_environment.check_sessions(TRANSCRIPTION_PATH)
    assert session["text_messages"] == 2
    assert session["close_received"] == {"code": 1000, "reason": "User ended conversation"}


def test_a_single_use_token_opens_a_session_with_the_account_that_created_it(session_environment):
    client = create_client(session_environment)
    # Creating a token costs no credits, so only the preceding session can detect an exhausted key.
    assert asyncio.run(transcribe(client))
    session_environment.check_sessions(TRANSCRIPTION_PATH)
    token = client.tokens.single_use.create("realtime_scribe").token
    assert asyncio.run(transcribe(client, token=token))
    session = session_environment.sessions()[-1]
    assert session["socket"]["payer"] == session_environment.serving_key
    assert f"token={token}" in session["path_and_query"]


class SimulatedAudioInterface(AudioInterface):
    """Replaces the microphone and the loudspeaker: sends `input_audio` when the session is connected, and records
    whether audio was received."""

    def __init__(self, input_audio):
        self._input_audio = input_audio
        self.connected = threading.Event()
        self.received_audio = threading.Event()

    def start(self, input_callback):
        if self._input_audio:
            input_callback(self._input_audio)
        self.connected.set()

    def stop(self):
        pass

    def output(self, audio):
        assert audio
        self.received_audio.set()

    def interrupt(self):
        pass


@contextlib.contextmanager
def open_conversation(session_environment, audio_interface, requires_auth=False, **options):
    """Opens a conversation, and ends it after the block. Asserts that the user has ended it."""
    ended = []
    session = Conversation(
        create_client(session_environment),
        AGENT,
        requires_auth=requires_auth,
        audio_interface=audio_interface,
        callback_disconnect=ended.append,
        **options,
    )
    session.start_session()
    try:
        yield session
    finally:
        session.end_session()
        conversation_id = session.wait_for_session_end()
    assert conversation_id.startswith("conv_")
    assert [details.reason for details in ended] == ["user"]


def test_a_voice_conversation_with_an_agent_works(session_environment):
    audio_interface = SimulatedAudioInterface(SILENT_SECOND)
    with open_conversation(session_environment, audio_interface):
        assert audio_interface.received_audio.wait(TIMEOUT_SECONDS)
    assert session_environment.check_sessions(CONVERSATION_PATH)["text_messages"] >= 2


def test_a_text_conversation_with_an_agent_works(session_environment):
    audio_interface = SimulatedAudioInterface(b"")
    responses = queue.Queue()
    with open_conversation(session_environment, audio_interface, callback_agent_response=responses.put) as conversation:
        assert audio_interface.connected.wait(TIMEOUT_SECONDS)
        conversation.send_user_message("How are you?")
        assert responses.get(timeout=TIMEOUT_SECONDS)
        conversation.send_user_message("And now?")
        assert responses.get(timeout=TIMEOUT_SECONDS)
    assert session_environment.check_sessions(CONVERSATION_PATH)["text_messages"] >= 3


def test_a_conversation_with_a_signed_url_works(session_environment):
    # Signing a URL costs no credits, so only the preceding session can detect an exhausted key.
    for requires_auth in (False, True):
        audio_interface = SimulatedAudioInterface(SILENT_SECOND)
        with open_conversation(session_environment, audio_interface, requires_auth):
            assert audio_interface.received_audio.wait(TIMEOUT_SECONDS)
        if not requires_auth:
            session_environment.check_sessions(CONVERSATION_PATH)
    session = session_environment.sessions()[-1]
    assert session["socket"]["payer"] == session_environment.serving_key
    assert "conversation_signature=" in session["path_and_query"]


# The forms of a client credential. Each has headers, the end of the query, and members of the first message.
CREDENTIAL_FORMS = {
    "a header": ({"xi-api-key": CLIENT_TOKEN}, "", {}),
    "a bearer token": ({"Authorization": f"Bearer {CLIENT_TOKEN}"}, "", {}),
    "a query": ({}, f"&authorization={CLIENT_TOKEN}", {}),
    "a message, as published": ({}, "", {"xi_api_key": CLIENT_TOKEN}),
    "a message, as in the types of the SDK": ({}, "", {"xi-api-key": CLIENT_TOKEN}),
    "a message, as a bearer token": ({}, "", {"authorization": f"Bearer {CLIENT_TOKEN}"}),
}


@pytest.mark.parametrize("session_environment", WS_CASES[:3], indirect=True, ids=" ".join)
def test_a_client_credential_does_not_reach_the_provider(session_environment):
    async def speak(headers, query, member):
        url = f"{session_environment.ws}/v1/text-to-speech/{VOICE}/stream-input?model_id={MODEL}{query}"
        async with websockets.connect(url, additional_headers=headers) as socket:
            for message in ({"text": " ", **member}, {"text": f"{TEXT} "}, {"text": ""}):
                await socket.send(json.dumps(message))
            return [json.loads(message) async for message in socket]

    for form in CREDENTIAL_FORMS.values():
        responses = asyncio.run(asyncio.wait_for(speak(*form), TIMEOUT_SECONDS))
        assert responses[-1]["isFinal"] is True
        assert any(response.get("audio") for response in responses)
    assert session_environment.check_sessions(SPEECH_PATH, served=len(CREDENTIAL_FORMS))["spoken"].strip() == TEXT
