// Creates the picture of the dashboard in the README: the overview of a pool with requests and with keys that need
// attention. The test is skipped without `UPDATE_SCREENSHOT=1`.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdirSync, statSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { openPage, signIn } from "./browser.mjs";
import { startDashboard, waitUntil } from "./dashboard.mjs";

const PICTURE = fileURLToPath(new URL("../../docs/images/dashboard.png", import.meta.url));
const MAX_BYTES = 150_000;
const createKey = (name) => `sk_${name}_picture_00000000000000000000`.slice(0, 34);

test("the picture of the README is written", { skip: !process.env.UPDATE_SCREENSHOT && "it needs UPDATE_SCREENSHOT=1" }, async (t) => {
  const credits = { studio: 100_000, podcast: 60_000, games: 10_000, archive: 500, trial: 10_000 };
  const dashboard = await startDashboard(t, {
    keys: Object.entries(credits).map(([name, credits]) => ({ key: createKey(name), name, credits })),
    faults: [`${createKey("trial")}@/v1/text-to-speech:rate_limit=600`],
    settings: { KEYCHOIR_POOL__STRATEGY: "round-robin" },
  });
  const changeKeys = async (names, action) => {
    for (const name of names) await dashboard.api(`keys/${(await dashboard.key(name)).id}/${action}`, "POST", {});
  };
  /** Requests speech with one of the keys. */
  const speak = async (name, characters) => {
    const others = Object.keys(credits).filter((other) => other !== name);
    await changeKeys(others, "pause");
    await dashboard.speak("a".repeat(characters));
    await changeKeys(others, "resume");
  };
  const speechByKey = [["studio", 4_000], ["podcast", 2_600], ["games", 4_300], ["games", 4_300], ["archive", 500]];
  for (const [name, characters] of speechByKey) await speak(name, characters);
  for (let request = 0; request < 60; request++) await dashboard.speak("a".repeat(20 + (request % 7) * 10));
  await dashboard.waitForAttempts(60);
  const states = async () => Object.fromEntries((await dashboard.keys()).map(({ name, state }) => [name, state]));
  await waitUntil(async () => (await states()).archive === "exhausted");
  assert.deepEqual(await states(), { studio: "active", podcast: "active", games: "near_limit", archive: "exhausted", trial: "rate_limited" });
  execFileSync("python3", [fileURLToPath(new URL("earlier_hours.py", import.meta.url)), join(dashboard.directory, "keychoir.db")]);

  const context = await signIn(dashboard, { colorScheme: "light", locale: "en-US", timezoneId: "UTC", viewport: { width: 1280, height: 1165 } });
  t.after(() => context.close());
  const page = await openPage(context);
  await page.goto(`${dashboard.url}/_/`);
  await page.locator("canvas").first().waitFor();
  mkdirSync(join(PICTURE, ".."), { recursive: true });
  await page.screenshot({ path: PICTURE, animations: "disabled" });
  assert.ok(statSync(PICTURE).size <= MAX_BYTES, `the picture must have at most ${MAX_BYTES} bytes, not ${statSync(PICTURE).size}`);
});
