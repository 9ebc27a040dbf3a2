// Starts the simulator and Keychoir with its dashboard, both on free ports, for the tests of the dashboard. The
// returned object calls the admin API, sends requests, sets faults, and reloads and restarts Keychoir.

import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { BINARY, run, start } from "../support/program.mjs";

export const ADMIN_TOKEN = "kca_canary_admin_token_4417";
/** The first key of the pool, whose short form is `sk_firs...0001`. */
export const FIRST_KEY = "sk_first_canary_00000000000000001";
export const SECOND_KEY = "sk_second_canary_0000000000000002";
/** A key that the provider knows and the pool does not. */
export const SPARE_KEY = "sk_spare_canary_00000000000000003";
const SPEECH_PATH = "/v1/text-to-speech/JBFqnCBsd6RMkjVDRZzb";

/** Resolves when `condition` returns or resolves with a true value, with this value. */
export async function waitUntil(condition) {
  for (const end = Date.now() + 30_000; Date.now() < end; await new Promise((resolve) => setTimeout(resolve, 10))) {
    const outcome = await condition();
    if (outcome) return outcome;
  }
  throw new Error(`a condition must hold within 30 seconds: ${condition}`);
}

/** Returns the event in a line of the log, or an empty object for a line that is not JSON. */
const parseEvent = (line) => (line.startsWith("{") ? JSON.parse(line) : {});

/** Returns the configuration of keys: a TOML table for each key, without its credits. */
export const keyTables = (keys) =>
  keys.map(({ key, credits, ...settings }) => `[[keys]]\n${Object.entries({ key, ...settings }).map(([name, value]) => `${name} = ${JSON.stringify(value)}\n`).join("")}`).join("");

/**
 * Starts Keychoir in front of a simulator. Both are stopped at the end of `context`, which is the context of a test, or
 * `{ after }` for the end of the test file.
 *
 * @param keys objects with `key`, `credits` and the other settings of a key
 * @param spare keys that the provider knows and the pool does not, with their credits
 * @param faults arguments of `--fault`
 * @param config additional text of the configuration file
 * @param settings variables of the environment
 */
export async function startDashboard(context, options = {}) {
  const {
    keys = [{ key: FIRST_KEY, name: "first", credits: 20_000 }, { key: SECOND_KEY, name: "second", credits: 20_000 }],
    spare = { [SPARE_KEY]: 5_000 }, faults = [], config = "", settings = {},
  } = options;
  const directory = mkdtempSync(join(tmpdir(), "keychoir-web-"));
  const keyCredits = [...keys.map(({ key, credits }) => [key, credits]), ...Object.entries(spare)];
  const simulator = await start("stdout", (line) => line.match(/http:\/\/\S+/)?.[0], [
    "simulate", "--listen", "127.0.0.1:0", ...keyCredits.flatMap(([key, credits]) => ["--key", `${key}=${credits}`]), ...faults.flatMap((fault) => ["--fault", fault]),
  ]);
  const configFile = join(directory, "keychoir.toml");
  const tokenFile = join(directory, "token");
  writeFileSync(tokenFile, ADMIN_TOKEN);
  const baseConfig = `${keyTables(keys)}${config}\n[admin]\ntoken_file = ${JSON.stringify(tokenFile)}\n`;
  writeFileSync(configFile, baseConfig);
  const environment = {
    KEYCHOIR_CONFIG: configFile,
    KEYCHOIR_UPSTREAM__BASE_URL: simulator.parsedValue,
    KEYCHOIR_STORAGE__PATH: join(directory, "keychoir.db"),
    KEYCHOIR_RETRY__MIN_DISK_FREE_PERCENT: "0",
    KEYCHOIR_LOG__FORMAT: "json",
    KEYCHOIR_SERVER__DRAIN_IDLE_TIMEOUT: "0s",
    ...settings,
  };
  const serve = async (address) => {
    const program = await start("stderr", (line) => parseEvent(line).event === "server_status_url", ["serve", "--listen", address], environment);
    const addressOf = (name) => program.lines.map(parseEvent).find(({ event }) => event === name)?.address;
    return Object.assign(program, { address: addressOf("server_started"), adminAddress: addressOf("admin_started") });
  };
  const dashboard = {
    directory,
    adminToken: ADMIN_TOKEN,
    baseConfig,
    configFile,
    tokenFile,
    simulator: simulator.parsedValue,
    program: await serve("127.0.0.1:0"),
    /** The address of clients. */
    get url() {
      return `http://${this.program.address}`;
    },
    /** The address of operators. */
    get adminUrl() {
      return `http://${this.program.adminAddress ?? this.program.address}`;
    },
    /** Calls the admin API. Resolves with the document of its response. */
    async api(path, method = "GET", body) {
      const headers = { authorization: `Bearer ${this.adminToken}`, "content-type": "application/json" };
      const response = await fetch(`${this.adminUrl}/api/keychoir/v1/${path}`, { method, headers, body: body && JSON.stringify(body) });
      const document = await response.json();
      assert.ok(response.ok, `${method} ${path} must succeed: ${response.status} ${JSON.stringify(document)}`);
      return document;
    },
    async keys() {
      return (await this.api("keys")).keys;
    },
    async key(name) {
      return (await this.keys()).find((key) => key.name === name);
    },
    async client(name) {
      return (await this.api("clients")).clients.find((client) => client.name === name);
    },
    /** Resolves with the recorded changes of operators, the latest first. */
    async changes() {
      return (await this.api("changes")).changes;
    },
    /** Resolves with a new link that opens the dashboard, as `keychoir dashboard` prints it. */
    async createLink() {
      const output = await run(BINARY, ["dashboard", "--no-open", "--url", this.adminUrl], { ...environment, KEYCHOIR_ADMIN_TOKEN: this.adminToken });
      return output.trim();
    },
    /** Requests speech, and reads the response. */
    async speak(text = "Hello", token = "local") {
      const headers = { "xi-api-key": token, "content-type": "application/json" };
      const body = JSON.stringify({ text, model_id: "eleven_multilingual_v2" });
      const response = await fetch(`${this.url}${SPEECH_PATH}`, { method: "POST", headers, body });
      await response.arrayBuffer();
      return response;
    },
    /** Sets the fault of all further requests with a key. */
    async setFault(key, always) {
      const response = await fetch(`${simulator.parsedValue}/_simulator/faults`, { method: "POST", body: JSON.stringify({ key, always }) });
      assert.ok(response.ok, `the simulator must accept the fault: ${await response.text()}`);
    },
    /** Resolves when the usage database contains at least this number of attempts. */
    waitForAttempts(count) {
      return waitUntil(async () => (await this.api("attempts?limit=200")).attempts.length >= count);
    },
    /** Writes the configuration file and waits until it is reloaded. */
    async configure(text) {
      writeFileSync(configFile, text);
      const reloaded = this.program.waitForLine((line) => parseEvent(line).event === "reloaded");
      this.program.signal("SIGHUP");
      await reloaded;
    },
    /** Stops the program and starts it at the same address, with the same state. */
    async restart() {
      const { address } = this.program;
      assert.equal(await this.program.stop(), 0);
      this.program = await serve(address);
    },
    /** Returns the paths and contents of all files that Keychoir uses, and its log. */
    readStoredFiles() {
      const files = readdirSync(directory, { recursive: true, withFileTypes: true }).filter((file) => file.isFile());
      const paths = files.map((file) => join(file.parentPath ?? file.path, file.name));
      return [...paths.map((path) => [path, readFileSync(path, "latin1")]), ["log", this.program.lines.join("\n")]];
    },
  };
  context.after(async () => {
    assert.equal(await dashboard.program.stop(), 0);
    const { violations } = await (await fetch(`${simulator.parsedValue}/_simulator/ledger`)).json();
    await simulator.stop();
    rmSync(directory, { recursive: true });
    assert.deepEqual(violations, [], "the provider must have received no secret and no invalid request");
  });
  return dashboard;
}
