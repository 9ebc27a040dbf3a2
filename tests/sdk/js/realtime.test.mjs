// The official JavaScript clients' sockets through Keychoir: a session works, whichever keys refuse it.

import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { house, node } from "./house.mjs";
import { CLIENT_TOKEN, SESSIONS } from "./sessions.mjs";

const FIRST = ["sk_session_number_0001", "sk_session_number_0002"];
const LAST = "sk_session_number_0003";

/** How the first two keys stand: what the simulator is told of them, and their credits. */
const STANDINGS = {
  "every key serves": { refused: [], credits: 1_000_000 },
  "the first keys are invalid": { refused: FIRST, fault: "invalid", credits: 1_000_000 },
  "the first keys are spent": { refused: FIRST, credits: 0 },
  "the first keys are busy": { refused: FIRST, fault: "concurrency", credits: 1_000_000 },
};

/** What the provider must have seen of a session that was held. */
async function check(started, { path, isMinted }, refused) {
  const ledger = await started.ledger();
  assert.ok(!JSON.stringify(ledger).includes(CLIENT_TOKEN), "the client's token arrived");
  const sessions = ledger.requests.filter((request) => request.socket);
  for (const session of sessions) assert.ok(session.path_and_query.startsWith(path), session.path_and_query);
  const serving = refused.length ? LAST : FIRST[0];
  if (isMinted) {
    const minted = sessions.pop();
    assert.match(minted.path_and_query, /token=|conversation_signature=/);
    assert.equal(minted.socket.payer, serving);
  }
  assert.deepEqual(sessions.map((session) => session.key), [...refused, serving]);
  assert.deepEqual(sessions.map((session) => Boolean(session.socket.refused)), [...refused.map(() => true), false]);
}

/** A house whose first keys stand so, and which is reached over this scheme. */
async function open({ fault, credits }, scheme) {
  const keys = Object.fromEntries([...FIRST.map((key) => [key, credits]), [LAST, 1_000_000]]);
  // Nothing but sessions asks the keys: a refusal is met there and nowhere before.
  const started = await house(keys, { KEYCHOIR_QUOTA_POLLING__ENABLED: "false" });
  if (fault) for (const key of FIRST) await started.fault(key, fault);
  await started.configure(`websocket.signed_url_base = "${started.url.replace("http", scheme)}"`);
  return started;
}

for (const [standing, how] of Object.entries(STANDINGS)) {
  for (const [name, session] of Object.entries(SESSIONS)) {
    test(`${name} over ws: ${standing}`, async () => {
      const started = await open(how, "ws");
      try {
        await session.hold(started.url);
        await check(started, session, how.refused);
      } finally {
        await started.close();
      }
    });
  }

  // One other Node, which takes a second to load the clients, for all of them.
  test(`over wss: ${standing}`, async (t) => {
    const names = Object.keys(SESSIONS);
    const folder = mkdtempSync(join(tmpdir(), "keychoir-"));
    const houses = await Promise.all(names.map(() => open(how, "wss")));
    try {
      const authorities = await Promise.all(houses.map((started) => started.authority()));
      const NODE_EXTRA_CA_CERTS = join(folder, "authorities.pem");
      writeFileSync(NODE_EXTRA_CA_CERTS, authorities.map((path) => readFileSync(path, "utf8")).join(""));
      const bases = houses.map(({ url }) => url.replace("http://", "https://"));
      const script = `import { holdAll } from "./sessions.mjs"; console.log(JSON.stringify(await holdAll(${JSON.stringify(bases)})));`;
      const failures = JSON.parse((await node(script, { NODE_EXTRA_CA_CERTS })).split("\n").at(-2));
      for (const [index, name] of names.entries()) {
        await t.test(name, async () => {
          assert.equal(failures[index], null);
          await check(houses[index], SESSIONS[name], how.refused);
        });
      }
    } finally {
      for (const started of houses) await started.close();
      rmSync(folder, { recursive: true });
    }
  });
}
