// The binary as a person starts it: a simulated ElevenLabs, Keychoir before it, both on port 0.

import { randomUUID } from "node:crypto";
import { execFile, spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import assert from "node:assert/strict";

const BINARY = process.env.KEYCHOIR_BIN ?? fileURLToPath(new URL("../../../target/debug/keychoir", import.meta.url));

/** This machine's environment without what concerns Keychoir. */
const clean = () => Object.fromEntries(Object.entries(process.env).filter(([name]) => !/^(KEYCHOIR_|ELEVENLABS_|NODE_EXTRA_)/.test(name)));

/** Starts the binary; resolves with it once `wanted` finds something in a line of `stream`. */
async function start(stream, wanted, args, environment = {}) {
  const stdio = ["ignore", stream === "stdout" ? "pipe" : "inherit", stream === "stderr" ? "pipe" : "inherit"];
  const child = spawn(BINARY, args, { env: { ...clean(), ...environment }, stdio });
  const lines = [];
  const ended = new Promise((resolve) => child.once("close", resolve));
  const reader = createInterface({ input: child[stream] }).on("line", (line) => lines.push(line));
  /** What it finds in the first line that it finds something in, from now on. */
  const said = (wanted) =>
    new Promise((resolve, reject) => {
      ended.then((code) => reject(new Error(`it ended with ${code}: ${lines.join("\n")}`)));
      reader.on("line", function look(line) {
        const found = wanted(line);
        if (!found) return;
        reader.off("line", look);
        resolve(found);
      });
    });
  const found = await said(wanted);
  return { found, lines, said, signal: (name) => child.kill(name), stop: () => (child.kill("SIGTERM"), ended) };
}

/** Runs a program to its end; resolves with what it printed. */
async function run(file, args, environment) {
  const { stdout } = await promisify(execFile)(file, args, { env: { ...clean(), ...environment }, timeout: 60_000 });
  return stdout;
}

/** Runs a script in a Node of its own: some variables are read at the start only. */
export const node = (script, environment) => run(process.execPath, ["--input-type=module", "-e", script], environment);

/** Sockets whose messages do not tell what they cost; the watch asks for an agent's price later. */
const UNTOLD = /^\/v1\/(speech-to-text\/realtime|convai\/conversation)\?/;

const json = async (url) => (await fetch(url)).json();

/** Keychoir, with these settings, before a simulator with these keys. */
export async function house(keys, settings = {}) {
  const folder = mkdtempSync(join(tmpdir(), "keychoir-"));
  const simulator = await start("stdout", (line) => line.match(/http:\/\/\S+/)?.[0], [
    "simulate", "--listen", "127.0.0.1:0", ...Object.entries(keys).flatMap(([key, credits]) => ["--key", `${key}=${credits}`]),
  ]);
  const address = (line) => {
    const event = JSON.parse(line);
    return event.event === "server_started" && event.address;
  };
  const file = join(folder, "keychoir.toml");
  writeFileSync(file, "");
  const keychoir = await start("stderr", address, ["serve", "--listen", "127.0.0.1:0", "--config", file], {
    ELEVENLABS_API_KEYS: Object.keys(keys).join(","),
    KEYCHOIR_UPSTREAM__BASE_URL: simulator.found,
    KEYCHOIR_STORAGE__PATH: join(folder, "keychoir.db"),
    KEYCHOIR_LOG__FORMAT: "json",
    ...settings,
  });
  const url = `http://${keychoir.found}`;
  const env = () => run(BINARY, ["env"], { KEYCHOIR_STORAGE__PATH: join(folder, "keychoir.db") });
  const ledger = () => json(`${simulator.found}/_simulator/ledger`);
  return {
    url,
    /** The file that `keychoir env` has Node trust. */
    authority: async () => (await env()).match(/^export NODE_EXTRA_CA_CERTS=(.*)$/m)[1],
    ledger,
    /** Sets what every request and every session with this key meets from now on. */
    fault: (key, always) => fetch(`${simulator.found}/_simulator/faults`, { method: "POST", body: JSON.stringify({ key, always }) }),
    /** Settles what cannot be known before it listens, and waits until it counts. */
    async configure(text) {
      writeFileSync(file, text);
      const reloaded = keychoir.said((line) => JSON.parse(line).event === "reloaded");
      keychoir.signal("SIGHUP");
      await reloaded;
    },
    status: () => json(`${url}/api/elevenlabs-status`),
    /** Events of one kind. Lines come in order: when that of this request is there, all before it are. */
    async events(name) {
      const id = randomUUID();
      const told = keychoir.said((line) => JSON.parse(line).request_id === id);
      await (await fetch(`${url}/v1/models`, { headers: { "x-request-id": id } })).arrayBuffer();
      await told;
      return keychoir.lines.map((line) => JSON.parse(line)).filter((event) => event.event === name);
    },
    /** Ends both, and holds Keychoir's own account against the provider's ledger. */
    async close() {
      assert.equal(await keychoir.stop(), 0);
      const { violations, keys: entries, requests } = await ledger();
      await simulator.stop();
      assert.deepEqual(violations, []);
      const booked = {};
      for (const event of keychoir.lines.map((line) => JSON.parse(line)).filter((event) => event.event === "request_ended")) {
        booked[event.key] = (booked[event.key] ?? 0) + event.credits;
      }
      for (const { key, charged } of entries) {
        const untold = requests.filter((request) => request.socket?.payer === key && UNTOLD.test(request.path_and_query));
        const known = untold.reduce((sum, request) => sum - request.charged, charged);
        assert.equal(booked[short(key)] ?? 0, known, `credits of ${short(key)}`);
      }
      rmSync(folder, { recursive: true });
    },
  };
}

/** What may be shown of a key of these tests, which are all shorter than 48 characters. */
function short(key) {
  assert.ok(key.length >= 16 && key.length < 48, "tests use keys whose short forms differ");
  return `${key.slice(0, 4)}...${key.slice(-4)}`;
}
