"""Tests calls of the official Python SDK and of its asynchronous client through Keychoir: with enough credits, while
keys run out of credits, with an exhausted pool, over HTTPS, and for resources of one account. Also tests the
certificate of Keychoir and the CA bundle of `keychoir env`."""

import asyncio
import base64
import io
import socket
import ssl

import certifi
import httpx
import pytest
from elevenlabs import AsyncElevenLabs, ElevenLabs
from elevenlabs.core.api_error import ApiError

VOICE = "21m00Tcm4TlvDq8ikWAM"
MODEL = "eleven_multilingual_v2"
TEXT = "The quick brown fox jumps over the lazy dog."
# The client credential, which must not reach the provider.
CLIENT_TOKEN = "anything-the-app-sends"

# Keys with their credits.
ENOUGH_CREDITS = {"sk_rich_one": 1_000_000}
FEW_CREDITS = {"sk_few_one": 150, "sk_few_two": 100, "sk_few_three": 200, "sk_rich_last": 1_000_000}
TOO_FEW_CREDITS = {"sk_poor_one": 60, "sk_poor_two": 50}


def is_mp3(audio):
    """Returns whether the bytes start as an MP3 file and are long enough to contain speech."""
    return len(audio) > 1_000 and (audio[:3] == b"ID3" or (audio[0] == 0xFF and audio[1] & 0xE0 == 0xE0))


def exhausted_keys(environment):
    """Returns the keys whose remaining credits do not suffice for `TEXT`."""
    return [key for key in environment.keychoir.status()["keys"] if key["remainingCharacters"] < len(TEXT)]


class Calls:
    """Calls of the SDK. Each call asserts that its response is correct."""

    def __init__(self, url):
        self.client = ElevenLabs(base_url=url, api_key=CLIENT_TOKEN)

    def convert(self):
        audio = b"".join(self.client.text_to_speech.convert(VOICE, text=TEXT, model_id=MODEL))
        assert is_mp3(audio)

    def stream(self):
        chunks = list(self.client.text_to_speech.stream(VOICE, text=TEXT, model_id=MODEL, output_format="pcm_16000"))
        assert len(b"".join(chunks)) > 16_000

    def with_timestamps(self):
        response = self.client.text_to_speech.convert_with_timestamps(VOICE, text=TEXT, model_id=MODEL)
        assert is_mp3(base64.b64decode(response.audio_base_64))
        assert "".join(response.alignment.characters) == TEXT

    def stream_with_timestamps(self):
        chunks = list(self.client.text_to_speech.stream_with_timestamps(VOICE, text=TEXT, model_id=MODEL))
        assert is_mp3(b"".join(base64.b64decode(chunk.audio_base_64) for chunk in chunks))

    def voices(self):
        assert any(voice.voice_id == VOICE for voice in self.client.voices.get_all().voices)
        assert self.client.voices.search().voices

    def models(self):
        assert MODEL in [model.model_id for model in self.client.models.list()]

    def subscription(self):
        assert self.client.user.subscription.get().character_limit > 0

    def user(self):
        user = self.client.user.get()
        assert user.subscription.character_limit > 0
        assert user.first_name is None and user.xi_api_key_preview is None

    def speech_to_text(self):
        recording = io.BytesIO(b"RIFF" + b"\x00" * 300_000)
        recording.name = "recording.wav"
        response = self.client.speech_to_text.convert(model_id="scribe_v2", file=recording)
        assert response.text and response.words

    def sound_effect(self):
        assert is_mp3(b"".join(self.client.text_to_sound_effects.convert(text="rain", duration_seconds=1)))

    def history(self):
        assert self.client.history.list().history is not None

    ALL = [
        convert,
        stream,
        with_timestamps,
        stream_with_timestamps,
        voices,
        models,
        subscription,
        user,
        speech_to_text,
        sound_effect,
        history,
    ]


@pytest.mark.parametrize("call", Calls.ALL, ids=lambda call: call.__name__)
def test_a_call_succeeds(start_environment, call):
    call(Calls(start_environment(ENOUGH_CREDITS).url))


def test_every_call_succeeds_while_keys_run_out(start_environment):
    environment = start_environment(FEW_CREDITS)
    calls = Calls(environment.url)
    for call in Calls.ALL * 2:
        call(calls)
    assert len(exhausted_keys(environment)) == 3
    assert environment.keychoir.events("key_passed_over"), "the log must report the exhausted keys"


def test_the_async_client_works_while_keys_run_out(start_environment):
    environment = start_environment(FEW_CREDITS)

    async def speak(client):
        return b"".join([chunk async for chunk in client.text_to_speech.convert(VOICE, text=TEXT, model_id=MODEL)])

    async def main():
        client = AsyncElevenLabs(base_url=environment.url, api_key=CLIENT_TOKEN)
        spoken = await asyncio.gather(*(speak(client) for _ in range(12)))
        assert all(map(is_mp3, spoken))
        assert (await client.voices.get_all()).voices
        assert await client.models.list()
        assert (await client.user.subscription.get()).tier
        recording = ("recording.wav", b"RIFF" + b"\x00" * 100_000, "audio/wav")
        assert (await client.speech_to_text.convert(model_id="scribe_v2", file=recording)).text
        timed = await client.text_to_speech.convert_with_timestamps(VOICE, text=TEXT, model_id=MODEL)
        assert timed.alignment.characters

    asyncio.run(main())
    assert len(exhausted_keys(environment)) == 3


def test_the_sdk_raises_the_error_of_an_exhausted_pool_without_a_retry(start_environment):
    environment = start_environment(TOO_FEW_CREDITS)
    client = ElevenLabs(base_url=environment.url, api_key=CLIENT_TOKEN)
    with pytest.raises(ApiError) as raised:
        for _ in range(3):
            list(client.text_to_speech.convert(VOICE, text=TEXT, model_id=MODEL))
    assert raised.value.status_code == 401
    detail = raised.value.body["detail"]
    assert detail["status"] == "quota_exceeded"
    assert detail["message"].startswith("All ElevenLabs API keys are exhausted or rate limited")
    count_before = environment.simulator.ledger()["totals"]["requests"]

    with pytest.raises(ApiError):
        client.text_to_speech.convert_with_timestamps(VOICE, text=TEXT, model_id=MODEL)
    count_after = environment.simulator.ledger()["totals"]["requests"]
    assert count_after == count_before, "an exhausted pool must send no request to the provider"
    environment.keychoir.process.wait_for_line(lambda line: "with-timestamps" in line)
    end_events = environment.keychoir.events("request_ended")
    end_events = [event for event in end_events if "with-timestamps" in event["route"]]
    assert len(end_events) == 1, "the SDK must not retry"


@pytest.fixture
def trusting_environment(start_environment, monkeypatch):
    """Starts an environment, and sets SSL_CERT_FILE as `keychoir env` does."""
    environment = start_environment(ENOUGH_CREDITS)
    monkeypatch.setenv("SSL_CERT_FILE", environment.keychoir.env(SSL_CERT_FILE=certifi.where())["SSL_CERT_FILE"])
    return environment


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_every_call_succeeds_over_https(trusting_environment, name):
    calls = Calls(trusting_environment.url.replace("http://127.0.0.1", f"https://{name}"))
    for call in Calls.ALL:
        call(calls)


def test_the_async_client_works_over_https(trusting_environment):
    async def main():
        client = AsyncElevenLabs(base_url=trusting_environment.url.replace("http://", "https://"), api_key=CLIENT_TOKEN)
        spoken = client.text_to_speech.convert(VOICE, text=TEXT, model_id=MODEL)
        assert is_mp3(b"".join([chunk async for chunk in spoken]))

    asyncio.run(main())


def test_https_fails_without_the_ca_certificate(start_environment):
    environment = start_environment(ENOUGH_CREDITS)
    client = ElevenLabs(base_url=environment.url.replace("http://", "https://"), api_key=CLIENT_TOKEN)
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        client.models.list()


def test_the_ca_bundle_contains_all_earlier_trusted_certificates(trusting_environment):
    earlier_count = len(ssl.create_default_context(cafile=certifi.where()).get_ca_certs())
    bundle = trusting_environment.keychoir.env(SSL_CERT_FILE=certifi.where())["SSL_CERT_FILE"]
    assert len(ssl.create_default_context(cafile=bundle).get_ca_certs()) == earlier_count + 1 > 100


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_the_certificate_passes_strict_verification(trusting_environment, name):
    # Python 3.13 and later verify strictly by default.
    context = ssl.create_default_context(cafile=trusting_environment.keychoir.env()["NODE_EXTRA_CA_CERTS"])
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    host, port = trusting_environment.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as tcp:
        with context.wrap_socket(tcp, server_hostname=name) as tls:
            assert tls.version() == "TLSv1.3"


# The first two of these accounts have credits for only a few sentences.
ACCOUNTS = {"sk_account_one": 200, "sk_account_two": 2_000, "sk_account_three": 1_000_000}


class VoiceApp:
    """An app that clones a voice and requests speech."""

    def __init__(self, url):
        self.client = ElevenLabs(base_url=url, api_key=CLIENT_TOKEN)

    def clone(self):
        sample = io.BytesIO(b"RIFF" + b"\x00" * 50_000)
        sample.name = "sample.wav"
        return self.client.voices.ivc.create(name="Mine", files=[sample]).voice_id

    def voices(self):
        return {voice.voice_id for voice in self.client.voices.get_all().voices}

    def speak(self, voice, **options):
        """Requests speech. Returns the IDs of the request and of the history item."""
        raw_text_to_speech = self.client.text_to_speech.with_raw_response
        with raw_text_to_speech.convert(voice, text=TEXT, model_id=MODEL, **options) as response:
            assert is_mp3(b"".join(response.data))
            return response.headers["request-id"], response.headers["history-item-id"]

    def speak_until_another_account_serves(self, environment):
        """Requests speech until the first account has run out of credits."""
        count_before = len(environment.keychoir.events("key_passed_over"))
        for _ in range(6):
            self.speak(VOICE)
            if len(environment.keychoir.events("key_passed_over")) > count_before:
                return
        raise AssertionError("the first account must run out of credits")


def test_resources_of_an_account_are_requested_with_its_key(start_environment):
    environment = start_environment(ACCOUNTS)
    app = VoiceApp(environment.url)
    voice = app.clone()
    assert voice in app.voices()
    first_request, first_item = app.speak(voice)
    app.speak(voice, previous_request_ids=[first_request])
    app.speak_until_another_account_serves(environment)

    # The pool now uses the key of another account. The following reads cost no credits.
    assert app.client.history.get(first_item).voice_id == voice
    assert is_mp3(b"".join(app.client.history.get_audio(first_item)))
    assert first_item in {item.history_item_id for item in app.client.history.list().history}
    assert voice in app.voices()
    second_request, second_item = app.speak(VOICE)
    app.speak(VOICE, previous_request_ids=[second_request])
    assert is_mp3(b"".join(app.client.history.get_audio(second_item)))

    # The owner of the voice is exhausted, and no other account has the voice.
    with pytest.raises(ApiError) as raised:
        app.speak(voice)
    assert (raised.value.status_code, raised.value.body["detail"]["code"]) == (401, "owner_exhausted")
    with pytest.raises(ApiError) as raised:
        app.speak(VOICE, previous_request_ids=[first_request, second_request])
    assert (raised.value.status_code, raised.value.body["detail"]["code"]) == (400, "conflicting_owners")

    # After a restart with the keys in another order, the owners are still known. Only owners of short-lived resources,
    # such as request IDs, are not stored.
    environment.restart(list(reversed(ACCOUNTS)))
    app = VoiceApp(environment.url)
    assert is_mp3(b"".join(app.client.history.get_audio(first_item)))
    assert app.client.voices.delete(voice).status == "ok"


def test_the_owner_of_an_unknown_voice_is_found(start_environment):
    environment = start_environment(ACCOUNTS)
    # The voice is created with the third key and not through Keychoir.
    direct_client = ElevenLabs(base_url=environment.simulator.url, api_key="sk_account_three")
    sample = io.BytesIO(b"RIFF")
    sample.name = "sample.wav"
    voice = direct_client.voices.ivc.create(name="Elsewhere", files=[sample]).voice_id
    app = VoiceApp(environment.url)
    app.speak(voice)
    request_count = environment.simulator.ledger()["totals"]["requests"]
    app.speak(voice)
    new_request_count = environment.simulator.ledger()["totals"]["requests"] - request_count
    assert new_request_count == 1, "the owner of the voice must be known after the first request"
    assert app.client.voices.get(voice).voice_id == voice
