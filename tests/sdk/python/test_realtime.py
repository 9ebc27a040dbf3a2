"""The official Python SDK's sockets through Keychoir: a session works, whichever keys refuse it."""

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

from sessions import CLIENT_TOKEN, PLAIN, SECRET
from test_sdk import MODEL, TEXT, VOICE, is_mp3

AGENT = "agent_of_the_simulator"
SPEECH = f"/v1/text-to-speech/{VOICE}/stream-input?"
SCRIBE = "/v1/speech-to-text/realtime?"
CONVERSATION = "/v1/convai/conversation?"
WAIT_MAX_S = 30
# A second of silence at 16 kHz.
SECOND = bytes(32_000)


def client_of(line):
    return ElevenLabs(base_url=line.http, api_key=CLIENT_TOKEN)


# Whatever the base URL is, this call knows wss alone.
@pytest.mark.parametrize("line", SECRET, indirect=True, ids=" ".join)
def test_text_becomes_speech_while_it_is_written(line):
    words = (f"{word} " for word in TEXT.split())
    spoken = client_of(line).text_to_speech.convert_realtime(VOICE, text=words, model_id=MODEL)
    assert is_mp3(b"".join(spoken))
    assert line.check(SPEECH)["spoken"].split() == TEXT.split()


async def transcribe(client, **options):
    """What becomes of a second of silence."""
    connection = await client.speech_to_text.realtime.connect(
        {"model_id": "scribe_v2_realtime", "audio_format": AudioFormat.PCM_16000, "sample_rate": 16_000, **options}
    )
    committed = asyncio.get_running_loop().create_future()
    ended = asyncio.Event()
    events = []

    def failed(event):
        events.append(event)
        if not committed.done():
            committed.set_exception(AssertionError(event))

    connection.on(RealtimeEvents.SESSION_STARTED, events.append)
    connection.on(RealtimeEvents.COMMITTED_TRANSCRIPT, committed.set_result)
    connection.on(RealtimeEvents.ERROR, failed)
    connection.on(RealtimeEvents.CLOSE, ended.set)
    await connection.send({"audio_base_64": base64.b64encode(SECOND).decode()})
    await connection.commit()
    try:
        transcript = await asyncio.wait_for(committed, WAIT_MAX_S)
    finally:
        await connection.close()
        await asyncio.wait_for(ended.wait(), WAIT_MAX_S)
    assert [event["message_type"] for event in events] == ["session_started"]
    return transcript["text"]


def test_speech_becomes_text_while_it_is_spoken(line):
    assert asyncio.run(transcribe(client_of(line), keyterms=["one term", "another"]))
    assert line.sessions()[-1]["path_and_query"].endswith("keyterms=one%20term&keyterms=another")
    session = line.check(SCRIBE)
    assert session["text_messages"] == 2
    assert session["close_received"] == {"code": 1000, "reason": "User ended conversation"}


def test_a_single_use_token_opens_a_session_of_the_account_that_gave_it(line):
    client = client_of(line)
    # Who gives one costs nobody anything: a key that is spent is known from a session before.
    assert asyncio.run(transcribe(client))
    line.check(SCRIBE)
    token = client.tokens.single_use.create("realtime_scribe").token
    assert asyncio.run(transcribe(client, token=token))
    session = line.sessions()[-1]
    assert session["socket"]["payer"] == line.serving
    assert f"token={token}" in session["path_and_query"]


class Telephone(AudioInterface):
    """Says this as soon as it is connected, and listens."""

    def __init__(self, says):
        self._says = says
        self.connected = threading.Event()
        self.heard = threading.Event()

    def start(self, input_callback):
        if self._says:
            input_callback(self._says)
        self.connected.set()

    def stop(self):
        pass

    def output(self, audio):
        assert audio
        self.heard.set()

    def interrupt(self):
        pass


@contextlib.contextmanager
def talk_to_agent(line, telephone, requires_auth=False, **more):
    """A session, which ends well."""
    ended = []
    talk = Conversation(
        client_of(line),
        AGENT,
        requires_auth=requires_auth,
        audio_interface=telephone,
        callback_disconnect=ended.append,
        **more,
    )
    talk.start_session()
    try:
        yield talk
    finally:
        talk.end_session()
        conversation = talk.wait_for_session_end()
    assert conversation.startswith("conv_")
    assert [details.reason for details in ended] == ["user"]


def test_an_agent_is_talked_to(line):
    telephone = Telephone(SECOND)
    with talk_to_agent(line, telephone):
        assert telephone.heard.wait(WAIT_MAX_S)
    assert line.check(CONVERSATION)["text_messages"] >= 2


def test_an_agent_is_written_to(line):
    telephone = Telephone(b"")
    answers = queue.Queue()
    with talk_to_agent(line, telephone, callback_agent_response=answers.put) as talk:
        assert telephone.connected.wait(WAIT_MAX_S)
        talk.send_user_message("How are you?")
        assert answers.get(timeout=WAIT_MAX_S)
        talk.send_user_message("And now?")
        assert answers.get(timeout=WAIT_MAX_S)
    assert line.check(CONVERSATION)["text_messages"] >= 3


def test_an_agent_that_wants_a_signed_url_is_talked_to(line):
    # Who signs one costs nobody anything: a key that is spent is known from a session before.
    for requires_auth in (False, True):
        telephone = Telephone(SECOND)
        with talk_to_agent(line, telephone, requires_auth):
            assert telephone.heard.wait(WAIT_MAX_S)
        if not requires_auth:
            line.check(CONVERSATION)
    session = line.sessions()[-1]
    assert session["socket"]["payer"] == line.serving
    assert "conversation_signature=" in session["path_and_query"]


PLACES = {
    "a header": ({"xi-api-key": CLIENT_TOKEN}, "", {}),
    "a bearer token": ({"Authorization": f"Bearer {CLIENT_TOKEN}"}, "", {}),
    "a query": ({}, f"&authorization={CLIENT_TOKEN}", {}),
    "a message, as published": ({}, "", {"xi_api_key": CLIENT_TOKEN}),
    "a message, as the SDK's types have it": ({}, "", {"xi-api-key": CLIENT_TOKEN}),
    "a message, as a bearer token": ({}, "", {"authorization": f"Bearer {CLIENT_TOKEN}"}),
}


@pytest.mark.parametrize("line", PLAIN[:3], indirect=True, ids=" ".join)
def test_a_credential_arrives_nowhere_wherever_it_is_presented(line):
    async def speak(headers, query, member):
        url = f"{line.ws}/v1/text-to-speech/{VOICE}/stream-input?model_id={MODEL}{query}"
        async with websockets.connect(url, additional_headers=headers) as socket:
            for message in ({"text": " ", **member}, {"text": f"{TEXT} "}, {"text": ""}):
                await socket.send(json.dumps(message))
            return [json.loads(message) async for message in socket]

    for place in PLACES.values():
        answers = asyncio.run(asyncio.wait_for(speak(*place), WAIT_MAX_S))
        assert answers[-1]["isFinal"] is True
        assert any(answer.get("audio") for answer in answers)
    assert line.check(SPEECH, served=len(PLACES))["spoken"].strip() == TEXT
