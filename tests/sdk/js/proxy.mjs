// Starts the simulator and Keychoir in front of it, both on free ports, for the tests with the official JavaScript
// clients. Also configures both, reads the ledger, the status document and the log, and runs scripts in new Node
// processes. At the end, the logged credits are compared with the credits that the simulator has charged.

import { randomUUID } from "node:crypto";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import assert from "node:assert/strict";
import { BINARY, run, start } from "../../support/program.mjs";

/** Runs a script in a new Node process, because Node reads some variables only at its start. */
export const runNode = (script, environment) => run(process.execPath, ["--input-type=module", "-e", script], environment);

/** WebSocket routes whose messages do not report the cost. Keychoir polls the price of a conversation after its end. */
const ROUTES_WITHOUT_REPORTED_COST = /^\/v1\/(speech-to-text\/realtime|convai\/conversation)\?/;

const fetchJson = async (url) => (await fetch(url)).json();

/**
 * Starts Keychoir in front of a simulator. `keys` contains the credits of each key, and `settings` contains environment
 * variables.
 */
export async function startEnvironment(keys, settings = {}) {
  const directory = mkdtempSync(join(tmpdir(), "keychoir-"));
  const simulator = await start("stdout", (line) => line.match(/http:\/\/\S+/)?.[0], [
    "simulate", "--listen", "127.0.0.1:0", ...Object.entries(keys).flatMap(([key, credits]) => ["--key", `${key}=${credits}`]),
  ]);
  const parseAddress = (line) => {
    const event = JSON.parse(line);
    return event.event === "server_started" && event.address;
  };
  const configFile = join(directory, "keychoir.toml");
  writeFileSync(configFile, "");
  const keychoir = await start("stderr", parseAddress, ["serve", "--listen", "127.0.0.1:0", "--config", configFile], {
    ELEVENLABS_API_KEYS: Object.keys(keys).join(","),
    KEYCHOIR_UPSTREAM__BASE_URL: simulator.parsedValue,
    KEYCHOIR_STORAGE__PATH: join(directory, "keychoir.db"),
    KEYCHOIR_LOG__FORMAT: "json",
    ...settings,
  });
  const url = `http://${keychoir.parsedValue}`;
  const printEnvironment = () => run(BINARY, ["env"], { KEYCHOIR_STORAGE__PATH: join(directory, "keychoir.db") });
  const ledger = () => fetchJson(`${simulator.parsedValue}/_simulator/ledger`);
  return {
    url,
    /** Resolves with the path of the CA file that `keychoir env` sets for Node. */
    caFile: async () => (await printEnvironment()).match(/^export NODE_EXTRA_CA_CERTS=(.*)$/m)[1],
    ledger,
    /** Sets the fault of all further requests and sessions with this key. */
    setFault: (key, always) => fetch(`${simulator.parsedValue}/_simulator/faults`, { method: "POST", body: JSON.stringify({ key, always }) }),
    /** Writes the configuration file and waits until it is reloaded. */
    async configure(text) {
      writeFileSync(configFile, text);
      const reloaded = keychoir.waitForLine((line) => JSON.parse(line).event === "reloaded");
      keychoir.signal("SIGHUP");
      await reloaded;
    },
    status: () => fetchJson(`${url}/api/elevenlabs-status`),
    /**
     * Sends a further request and waits until its event is logged, because the log is in order. Resolves with the
     * logged events of this name.
     */
    async events(name) {
      const id = randomUUID();
      const logged = keychoir.waitForLine((line) => JSON.parse(line).request_id === id);
      await (await fetch(`${url}/v1/models`, { headers: { "x-request-id": id } })).arrayBuffer();
      await logged;
      return keychoir.lines.map((line) => JSON.parse(line)).filter((event) => event.event === name);
    },
    /** Stops both programs. Asserts that the logged credits of each key are those that the simulator has charged. */
    async close() {
      assert.equal(await keychoir.stop(), 0);
      const { violations, keys: ledgerKeys, requests } = await ledger();
      await simulator.stop();
      assert.deepEqual(violations, []);
      const loggedCredits = {};
      for (const event of keychoir.lines.map((line) => JSON.parse(line)).filter((event) => event.event === "request_ended")) {
        loggedCredits[event.key] = (loggedCredits[event.key] ?? 0) + event.credits;
      }
      for (const { key, charged } of ledgerKeys) {
        const unreportedRequests = requests.filter((request) => request.socket?.payer === key && ROUTES_WITHOUT_REPORTED_COST.test(request.path_and_query));
        const expected = unreportedRequests.reduce((sum, request) => sum - request.charged, charged);
        assert.equal(loggedCredits[shortForm(key)] ?? 0, expected, `the logged credits of ${shortForm(key)} must be the charged credits`);
      }
      rmSync(directory, { recursive: true });
    },
  };
}

/** Returns the short form of a key with fewer than 48 characters. */
function shortForm(key) {
  assert.ok(key.length >= 16 && key.length < 48, "a key must have 16 to 47 characters");
  return `${key.slice(0, 4)}...${key.slice(-4)}`;
}
