// Tests WebSocket sessions of the official JavaScript clients through Keychoir, over ws and wss. The first two keys
// serve, or the provider refuses them as invalid, exhausted or busy (at their concurrency limit). If they are refused,
// the third key must serve the session.

import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { runNode, startEnvironment } from "./proxy.mjs";
import { CLIENT_TOKEN, SESSIONS } from "./sessions.mjs";

const FIRST_KEYS = ["sk_session_number_0001", "sk_session_number_0002"];
const LAST_KEY = "sk_session_number_0003";

/** The states of the first two keys: the refused keys, the fault in the simulator, and the credits of each. */
const KEY_STATES = {
  "every key serves": { refused: [], credits: 1_000_000 },
  "the first keys are invalid": { refused: FIRST_KEYS, fault: "invalid", credits: 1_000_000 },
  "the first keys are exhausted": { refused: FIRST_KEYS, credits: 0 },
  "the first keys are busy": { refused: FIRST_KEYS, fault: "concurrency", credits: 1_000_000 },
};

/**
 * Asserts that the provider received a session with each of the `refused` keys, then one with the serving key, and last
 * one with a token if `usesToken` is true.
 */
async function checkSessions(environment, { path, usesToken }, refused) {
  const ledger = await environment.ledger();
  assert.ok(!JSON.stringify(ledger).includes(CLIENT_TOKEN), "the provider must not receive the client token");
  const sessions = ledger.requests.filter((request) => request.socket);
  for (const { path_and_query: target } of sessions) {
    assert.ok(target.startsWith(path), `the session must be at ${path}, not at ${target}`);
  }
  const servingKey = refused.length ? LAST_KEY : FIRST_KEYS[0];
  if (usesToken) {
    const session = sessions.pop();
    assert.match(session.path_and_query, /token=|conversation_signature=/);
    assert.equal(session.socket.payer, servingKey);
  }
  assert.deepEqual(sessions.map((session) => session.key), [...refused, servingKey]);
  assert.deepEqual(sessions.map((session) => Boolean(session.socket.refused)), [...refused.map(() => true), false]);
}

/** Starts an environment whose first keys have the given state, for sessions over `scheme`, `ws` or `wss`. */
async function startSessionEnvironment({ fault, credits }, scheme) {
  const keys = Object.fromEntries([...FIRST_KEYS.map((key) => [key, credits]), [LAST_KEY, 1_000_000]]);
  // Quota polling is disabled, so that a session is the first to be refused.
  const environment = await startEnvironment(keys, { KEYCHOIR_QUOTA_POLLING__ENABLED: "false" });
  if (fault) for (const key of FIRST_KEYS) await environment.setFault(key, fault);
  await environment.configure(`websocket.signed_url_base = "${environment.url.replace("http", scheme)}"`);
  return environment;
}

for (const [keyState, options] of Object.entries(KEY_STATES)) {
  for (const [name, session] of Object.entries(SESSIONS)) {
    test(`${name} over ws: ${keyState}`, async () => {
      const environment = await startSessionEnvironment(options, "ws");
      try {
        await session.run(environment.url);
        await checkSessions(environment, session, options.refused);
      } finally {
        await environment.close();
      }
    });
  }

  // All sessions share one Node process, because loading the clients takes a second.
  test(`over wss: ${keyState}`, async (t) => {
    const names = Object.keys(SESSIONS);
    const directory = mkdtempSync(join(tmpdir(), "keychoir-"));
    const environments = await Promise.all(names.map(() => startSessionEnvironment(options, "wss")));
    try {
      const caFiles = await Promise.all(environments.map((environment) => environment.caFile()));
      const NODE_EXTRA_CA_CERTS = join(directory, "ca-bundle.pem");
      writeFileSync(NODE_EXTRA_CA_CERTS, caFiles.map((path) => readFileSync(path, "utf8")).join(""));
      const baseUrls = environments.map(({ url }) => url.replace("http://", "https://"));
      const script = `import { runAll } from "./sessions.mjs"; console.log(JSON.stringify(await runAll(${JSON.stringify(baseUrls)})));`;
      const failures = JSON.parse((await runNode(script, { NODE_EXTRA_CA_CERTS })).split("\n").at(-2));
      for (const [index, name] of names.entries()) {
        await t.test(name, async () => {
          assert.equal(failures[index], null);
          await checkSessions(environments[index], SESSIONS[name], options.refused);
        });
      }
    } finally {
      for (const environment of environments) await environment.close();
      rmSync(directory, { recursive: true });
    }
  });
}
