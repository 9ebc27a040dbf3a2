// Tests calls of the official JavaScript SDK through Keychoir: with enough credits, while keys run out of credits, with
// an exhausted pool, over HTTPS with and without the CA certificate, and for resources of one account.

import assert from "node:assert/strict";
import { test } from "node:test";
import { ElevenLabsClient, ElevenLabsError } from "@elevenlabs/elevenlabs-js";
import { runNode, startEnvironment } from "./proxy.mjs";

const VOICE = "21m00Tcm4TlvDq8ikWAM";
// These variables are named as the parameters of the SDK, so that calls can use the shorthand `{ text, modelId }`.
const modelId = "eleven_multilingual_v2";
const text = "The quick brown fox jumps over the lazy dog.";

// API keys with their credits.
const ENOUGH_CREDITS = { sk_rich_key_number_0001: 1_000_000 };
const FEW_CREDITS = {
  sk_few_key_number_a_0001: 150,
  sk_few_key_number_b_0002: 100,
  sk_few_key_number_c_0003: 200,
  sk_rich_key_at_end_0004: 1_000_000,
};
const TOO_FEW_CREDITS = { sk_poor_key_number_0001: 60, sk_poor_key_number_0002: 50 };

async function readAll(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return Buffer.concat(chunks);
}

function isMp3(audio) {
  return audio.length > 1_000 && (audio.subarray(0, 3).toString() === "ID3" || (audio[0] === 0xff && (audio[1] & 0xe0) === 0xe0));
}

/** Calls of the SDK by name, each with the checks of its result. */
const CALLS = {
  convert: async (client) => assert.ok(isMp3(await readAll(await client.textToSpeech.convert(VOICE, { text, modelId })))),
  stream: async (client) => {
    const audio = await readAll(await client.textToSpeech.stream(VOICE, { text, modelId, outputFormat: "pcm_16000" }));
    assert.ok(audio.length > 16_000);
  },
  "with timestamps": async (client) => {
    const response = await client.textToSpeech.convertWithTimestamps(VOICE, { text, modelId });
    assert.ok(isMp3(Buffer.from(response.audioBase64, "base64")));
    assert.equal(response.alignment.characters.join(""), text);
  },
  "stream with timestamps": async (client) => {
    const chunks = [];
    for await (const chunk of await client.textToSpeech.streamWithTimestamps(VOICE, { text, modelId })) {
      chunks.push(Buffer.from(chunk.audioBase64, "base64"));
    }
    assert.ok(isMp3(Buffer.concat(chunks)));
  },
  voices: async (client) => assert.ok((await client.voices.getAll()).voices.some((voice) => voice.voiceId === VOICE)),
  models: async (client) => assert.ok((await client.models.list()).some((model) => model.modelId === modelId)),
  subscription: async (client) => assert.ok((await client.user.subscription.get()).characterLimit > 0),
  user: async (client) => {
    const user = await client.user.get();
    assert.ok(user.subscription.characterLimit > 0);
    assert.equal(user.firstName ?? null, null);
  },
  "speech to text": async (client) => {
    const file = new File([Buffer.alloc(300_000)], "recording.wav", { type: "audio/wav" });
    assert.ok((await client.speechToText.convert({ modelId: "scribe_v2", file })).text);
  },
};

/** Starts an environment with `keys`, calls `runTest`, and then closes the environment even if the test has failed. */
async function withEnvironment(keys, runTest) {
  const environment = await startEnvironment(keys);
  try {
    await runTest(environment, new ElevenLabsClient({ baseUrl: environment.url, apiKey: "anything-the-app-sends" }));
  } finally {
    await environment.close();
  }
}

test("every call succeeds", async (t) => {
  await withEnvironment(ENOUGH_CREDITS, async (_, client) => {
    for (const [name, call] of Object.entries(CALLS)) await t.test(name, () => call(client));
  });
});

test("every call succeeds while keys run out", async () => {
  await withEnvironment(FEW_CREDITS, async (environment, client) => {
    for (let round = 0; round < 3; round += 1) for (const call of Object.values(CALLS)) await call(client);
    // The remaining credits of these keys suffice only for shorter texts.
    const exhausted = (await environment.status()).keys.filter((key) => key.remainingCharacters < text.length);
    assert.equal(exhausted.length, 3);
  });
});

test("the SDK throws the error of an exhausted pool without a retry", async () => {
  await withEnvironment(TOO_FEW_CREDITS, async (environment, client) => {
    const speak = () => client.textToSpeech.convertWithTimestamps(VOICE, { text, modelId });
    await speak();
    await speak();
    const previousRequestCount = (await environment.ledger()).totals.requests;
    await assert.rejects(speak, (error) => {
      assert.ok(error instanceof ElevenLabsError);
      assert.equal(error.statusCode, 401);
      assert.match(error.body.detail.message, /^All ElevenLabs API keys are exhausted or rate limited/);
      assert.ok(error.requestId);
      return true;
    });
    const newRequestCount = (await environment.ledger()).totals.requests - previousRequestCount;
    assert.ok(newRequestCount <= 2, "each key must receive at most one request");
    const endEvents = await environment.events("request_ended");
    assert.equal(endEvents.filter((event) => event.status === 401 && event.method === "POST").length, 1);
  });
});

test("HTTPS calls succeed only in a Node process that trusts the CA certificate", async () => {
  await withEnvironment(ENOUGH_CREDITS, async (environment) => {
    const speechScript = (host) => `
      import { ElevenLabsClient } from "@elevenlabs/elevenlabs-js";
      const baseUrl = "${environment.url.replace("http://127.0.0.1", `https://${host}`)}";
      const client = new ElevenLabsClient({ baseUrl, apiKey: "anything-the-app-sends", maxRetries: 0 });
      let length = 0;
      for await (const chunk of await client.textToSpeech.convert("${VOICE}", { text: "${text}", modelId: "${modelId}" }))
        length += chunk.length;
      console.log(length);`;
    const NODE_EXTRA_CA_CERTS = await environment.caFile();
    for (const host of ["127.0.0.1", "localhost"]) {
      assert.ok(Number(await runNode(speechScript(host), { NODE_EXTRA_CA_CERTS })) > 1_000);
    }
    await assert.rejects(runNode(speechScript("127.0.0.1"), { NODE_EXTRA_CA_CERTS: "" }), /fetch failed|certificate/);
  });
});

test("requests for the resources of an account use the key of that account", async () => {
  const accounts = { sk_account_number_0001: 200, sk_account_number_0002: 2_000, sk_account_number_0003: 1_000_000 };
  await withEnvironment(accounts, async (environment, client) => {
    const speak = async (voice, parameters = {}) => {
      const { data, rawResponse } = await client.textToSpeech.convert(voice, { text, modelId, ...parameters }).withRawResponse();
      assert.ok(isMp3(await readAll(data)));
      return { requestId: rawResponse.headers.get("request-id"), historyItemId: rawResponse.headers.get("history-item-id") };
    };
    const listVoiceIds = async () => (await client.voices.getAll()).voices.map((voice) => voice.voiceId);
    const sample = new File([Buffer.alloc(50_000)], "sample.wav", { type: "audio/wav" });
    const { voiceId } = await client.voices.ivc.create({ name: "Mine", files: [sample] });
    assert.ok((await listVoiceIds()).includes(voiceId));
    const firstSpeech = await speak(voiceId);
    await speak(voiceId, { previousRequestIds: [firstSpeech.requestId] });
    for (let round = 0; round < 4; round += 1) await speak(VOICE);
    assert.ok((await environment.status()).keys[0].remainingCharacters < text.length);

    // The pool now uses the key of another account. The reads below cost no credits.
    assert.equal((await client.history.get(firstSpeech.historyItemId)).voiceId, voiceId);
    assert.ok(isMp3(await readAll(await client.history.getAudio(firstSpeech.historyItemId))));
    assert.ok((await listVoiceIds()).includes(voiceId));
    const secondSpeech = await speak(VOICE);
    await speak(VOICE, { previousRequestIds: [secondSpeech.requestId] });

    for (const [voice, previousRequestIds, statusCode, code] of [
      [voiceId, [], 401, "owner_exhausted"],
      [VOICE, [firstSpeech.requestId, secondSpeech.requestId], 400, "conflicting_owners"],
    ]) {
      await assert.rejects(speak(voice, { previousRequestIds }), (error) => {
        assert.ok(error instanceof ElevenLabsError);
        assert.equal(error.statusCode, statusCode);
        assert.equal(error.body.detail.code, code);
        return true;
      });
    }
    assert.equal((await client.voices.delete(voiceId)).status, "ok");
  });
});
