// Sessions on sockets, as the official JavaScript clients hold them.

import assert from "node:assert/strict";
import { AudioFormat, ElevenLabsClient, RealtimeEvents } from "@elevenlabs/elevenlabs-js";
import { Conversation, Scribe, RealtimeEvents as ScribeEvents } from "@elevenlabs/client";
import { WebSocket } from "ws";

// Made for browsers; of what these have, a Node before 22 lacks only this.
globalThis.WebSocket ??= WebSocket;

/** What a client calls its key is its own affair; nothing of it may reach the provider. */
export const CLIENT_TOKEN = "anything-the-app-sends";

const agentId = "agent_of_the_simulator";
const modelId = "scribe_v2_realtime";
const sampleRate = 16_000;
const second = Buffer.alloc(2 * sampleRate).toString("base64");

const clientOf = (base) => new ElevenLabsClient({ baseUrl: base, apiKey: CLIENT_TOKEN, maxRetries: 0 });
const socketOf = (base) => base.replace(/^http/, "ws");

/** Says a second of silence and waits for what it becomes. */
async function transcribe(connection, events) {
  const text = await new Promise((resolve, reject) => {
    connection.on(events.ERROR, (error) => reject(new Error(JSON.stringify(error))));
    connection.on(events.SESSION_STARTED, () => {
      connection.send({ audioBase64: second });
      connection.commit();
    });
    connection.on(events.COMMITTED_TRANSCRIPT, (message) => resolve(message.text));
  });
  const closed = new Promise((resolve) => connection.on(events.CLOSE, resolve));
  connection.close();
  await closed;
  assert.ok(text);
}

/** Writes to an agent, and waits for what it answers. */
async function converse(options) {
  const { promise: answered, resolve, reject } = withResolvers();
  const conversation = await Conversation.startSession({
    ...options,
    textOnly: true,
    onMessage: ({ source, message }) => source === "ai" && resolve(message),
    onDisconnect: (details) => reject(new Error(JSON.stringify(details))),
  });
  conversation.sendUserMessage("How are you?");
  assert.ok(await answered);
  assert.match(conversation.getId(), /^conv_/);
  await conversation.endSession();
}

/** `Promise.withResolvers`, which a Node before 22 lacks. */
function withResolvers() {
  const parts = {};
  parts.promise = new Promise((resolve, reject) => Object.assign(parts, { resolve, reject }));
  return parts;
}

const transcribeWithKey = async (base) => {
  const connection = await clientOf(base).speechToText.realtime.connect({ modelId, audioFormat: AudioFormat.PCM_16000, sampleRate });
  await transcribe(connection, RealtimeEvents);
};

const converseWith = (more) => (base) => converse({ origin: socketOf(base), agentId, ...more });

const SCRIBE = "/v1/speech-to-text/realtime?";
const CONVERSATION = "/v1/convai/conversation?";

/**
 * Every session by its name: where it arrives, and how it is held through the proxy at `base`. One that `isMinted` is
 * with the account that gave its token or its URL; that costs nobody anything, so a session before it tells which keys
 * are spent.
 */
export const SESSIONS = {
  "elevenlabs-js transcribes": { path: SCRIBE, hold: transcribeWithKey },
  "a browser transcribes with a token": {
    path: SCRIBE,
    isMinted: true,
    hold: async (base) => {
      await transcribeWithKey(base);
      const { token } = await clientOf(base).tokens.singleUse.create("realtime_scribe");
      await transcribe(Scribe.connect({ baseUri: socketOf(base), token, modelId, audioFormat: "pcm_16000", sampleRate }), ScribeEvents);
    },
  },
  "a browser writes to an agent": { path: CONVERSATION, hold: converseWith({}) },
  "a browser with a token of its own writes to an agent": { path: CONVERSATION, hold: converseWith({ authorization: CLIENT_TOKEN }) },
  "a browser with a signed URL writes to an agent": {
    path: CONVERSATION,
    isMinted: true,
    hold: async (base) => {
      await converseWith({})(base);
      const { signedUrl } = await clientOf(base).conversationalAi.conversations.getSignedUrl({ agentId });
      await converse({ signedUrl });
    },
  },
};

/** Holds each session through the proxy of its own at the same place of `bases`; null for each that went well. */
export async function holdAll(bases) {
  const failures = [];
  for (const [index, { hold }] of Object.values(SESSIONS).entries()) {
    failures.push(await hold(bases[index]).then(() => null, (error) => String(error?.stack ?? error)));
  }
  return failures;
}
