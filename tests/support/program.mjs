// Starts the `keychoir` binary, waits for lines of its output and sends it signals, and runs programs to their exit, for
// tests in JavaScript.

import { execFile, spawn } from "node:child_process";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

/** The path of the binary: `KEYCHOIR_BIN`, or the debug build. */
export const BINARY = process.env.KEYCHOIR_BIN ?? fileURLToPath(new URL("../../target/debug/keychoir", import.meta.url));

/** Returns the environment without the variables that configure Keychoir or the certificates of Node. */
const cleanEnvironment = () => Object.fromEntries(Object.entries(process.env).filter(([name]) => !/^(KEYCHOIR_|ELEVENLABS_|NODE_EXTRA_)/.test(name)));

/** The running programs. They are killed when the test process exits, so that a failed test leaves none of them behind. */
const running = new Set();
process.once("exit", () => running.forEach((child) => child.kill("SIGKILL")));

/**
 * Starts the binary with `args`. Resolves once `parse` returns a truthy value for a line of `stream`, which is `stdout`
 * or `stderr`. `parsedValue` is this value, and `lines` contains all lines so far. `signal` sends a signal, and `stop`
 * sends SIGTERM and resolves with the exit code.
 */
export async function start(stream, parse, args, environment = {}) {
  const stdio = ["ignore", stream === "stdout" ? "pipe" : "inherit", stream === "stderr" ? "pipe" : "inherit"];
  const child = spawn(BINARY, args, { env: { ...cleanEnvironment(), ...environment }, stdio });
  running.add(child);
  child.once("close", () => running.delete(child));
  const lines = [];
  const ended = new Promise((resolve) => child.once("close", resolve));
  const reader = createInterface({ input: child[stream] }).on("line", (line) => lines.push(line));
  /** Resolves with the first truthy value that `parse` returns for a further line. */
  const waitForLine = (parse) =>
    new Promise((resolve, reject) => {
      ended.then((code) => reject(new Error(`the program exited with ${code}: ${lines.join("\n")}`)));
      reader.on("line", function parseLine(line) {
        const value = parse(line);
        if (!value) return;
        reader.off("line", parseLine);
        resolve(value);
      });
    });
  const parsedValue = await waitForLine(parse);
  return { parsedValue, lines, waitForLine, signal: (name) => child.kill(name), stop: () => (child.kill("SIGTERM"), ended) };
}

/** Runs the program `file` to its exit. Resolves with its standard output. */
export async function run(file, args, environment) {
  const { stdout } = await promisify(execFile)(file, args, { env: { ...cleanEnvironment(), ...environment }, timeout: 60_000 });
  return stdout;
}
