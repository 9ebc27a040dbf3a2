// Defines WebSocket sessions of the official JavaScript clients: transcriptions and conversations with an agent, also
// with tokens and signed URLs. `realtime.test.mjs` runs them through Keychoir.

import assert from "node:assert/strict";
import { AudioFormat, ElevenLabsClient, RealtimeEvents } from "@elevenlabs/elevenlabs-js";
import { Conversation, Scribe, RealtimeEvents as ScribeEvents } from "@elevenlabs/client";
import { WebSocket } from "ws";

// `@elevenlabs/client` needs a global WebSocket, which Node lacks before version 22.
globalThis.WebSocket ??= WebSocket;

/** The credential of the client, which must not reach the provider. */
export const CLIENT_TOKEN = "anything-the-app-sends";

const agentId = "agent_of_the_simulator";
const modelId = "scribe_v2_realtime";
const sampleRate = 16_000;
const silentSecond = Buffer.alloc(2 * sampleRate).toString("base64");

const createClient = (baseUrl) => new ElevenLabsClient({ baseUrl, apiKey: CLIENT_TOKEN, maxRetries: 0 });
const webSocketUrl = (baseUrl) => baseUrl.replace(/^http/, "ws");

/** Sends a second of silence and waits for its transcript. */
async function transcribe(connection, events) {
  const text = await new Promise((resolve, reject) => {
    connection.on(events.ERROR, (error) => reject(new Error(JSON.stringify(error))));
    connection.on(events.SESSION_STARTED, () => {
      connection.send({ audioBase64: silentSecond });
      connection.commit();
    });
    connection.on(events.COMMITTED_TRANSCRIPT, (message) => resolve(message.text));
  });
  const closed = new Promise((resolve) => connection.on(events.CLOSE, resolve));
  connection.close();
  await closed;
  assert.ok(text);
}

/** Sends a message to an agent and waits for its response. */
async function converse(options) {
  const { promise: response, resolve, reject } = withResolvers();
  const conversation = await Conversation.startSession({
    ...options,
    textOnly: true,
    onMessage: ({ source, message }) => source === "ai" && resolve(message),
    onDisconnect: (details) => reject(new Error(JSON.stringify(details))),
  });
  conversation.sendUserMessage("How are you?");
  assert.ok(await response);
  assert.match(conversation.getId(), /^conv_/);
  await conversation.endSession();
}

/** Does the same as `Promise.withResolvers`, which Node lacks before version 22. */
function withResolvers() {
  const resolvers = {};
  resolvers.promise = new Promise((resolve, reject) => Object.assign(resolvers, { resolve, reject }));
  return resolvers;
}

const transcribeWithKey = async (baseUrl) => {
  const connection = await createClient(baseUrl).speechToText.realtime.connect({ modelId, audioFormat: AudioFormat.PCM_16000, sampleRate });
  await transcribe(connection, RealtimeEvents);
};

const converseWith = (options) => (baseUrl) => converse({ origin: webSocketUrl(baseUrl), agentId, ...options });

const SCRIBE = "/v1/speech-to-text/realtime?";
const CONVERSATION = "/v1/convai/conversation?";

/**
 * The sessions by name: their path at the provider, and the function that runs them through Keychoir at `baseUrl`. A
 * session with `usesToken` uses the account that created its token or signed URL. Creating a token costs no credits, so
 * the function first runs a session without a token, which detects exhausted keys.
 */
export const SESSIONS = {
  "elevenlabs-js transcribes": { path: SCRIBE, run: transcribeWithKey },
  "a browser transcribes with a token": {
    path: SCRIBE,
    usesToken: true,
    run: async (baseUrl) => {
      await transcribeWithKey(baseUrl);
      const { token } = await createClient(baseUrl).tokens.singleUse.create("realtime_scribe");
      await transcribe(Scribe.connect({ baseUri: webSocketUrl(baseUrl), token, modelId, audioFormat: "pcm_16000", sampleRate }), ScribeEvents);
    },
  },
  "a browser writes to an agent": { path: CONVERSATION, run: converseWith({}) },
  "a browser with its own token writes to an agent": { path: CONVERSATION, run: converseWith({ authorization: CLIENT_TOKEN }) },
  "a browser with a signed URL writes to an agent": {
    path: CONVERSATION,
    usesToken: true,
    run: async (baseUrl) => {
      await converseWith({})(baseUrl);
      const { signedUrl } = await createClient(baseUrl).conversationalAi.conversations.getSignedUrl({ agentId });
      await converse({ signedUrl });
    },
  },
};

/**
 * Runs each session through the Keychoir with the same index in `baseUrls`. Resolves with one item per session: the
 * error, or null if the session succeeded.
 */
export async function runAll(baseUrls) {
  const failures = [];
  for (const [index, { run }] of Object.values(SESSIONS).entries()) {
    failures.push(await run(baseUrls[index]).then(() => null, (error) => String(error?.stack ?? error)));
  }
  return failures;
}
