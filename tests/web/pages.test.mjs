// Tests each page in both color schemes and at two widths: accessibility, layout, content security policy and charts.

import assert from "node:assert/strict";
import { after, test } from "node:test";
import { auditAccessibility, browser, openPage, signIn } from "./browser.mjs";
import { FIRST_KEY, SECOND_KEY, startDashboard, waitUntil } from "./dashboard.mjs";

const LONG_NAME = "voice_agent_of_the_night_shift";
const EXHAUSTED_KEY = "sk_exhausted_canary_0000000000004";
const INVALID_KEY = "sk_invalid_canary_000000000000005";
const LIMITED_KEY = "sk_limited_canary_000000000000006";
const CLIENT_TOKEN = "token_of_a_client_of_the_pages";

/** A pool with keys in five states, clients with limits, changes, and requests that were retried. */
const dashboard = await startDashboard({ after }, {
  keys: [
    { key: LIMITED_KEY, name: "limited", credits: 9_000 },
    { key: INVALID_KEY, name: "invalid", credits: 9_000 },
    { key: EXHAUSTED_KEY, name: "exhausted", credits: 9_000 },
    { key: FIRST_KEY, name: LONG_NAME, credits: 1_000, workspace: "studio" },
    { key: SECOND_KEY, name: "paused", credits: 20_000 },
  ],
  faults: [`${LIMITED_KEY}:rate_limit=600`, `${INVALID_KEY}:invalid`, `${EXHAUSTED_KEY}:quota`],
  config: `[[clients]]\nname = "${LONG_NAME}"\ntoken = "${CLIENT_TOKEN}"\nquota = "100 requests per day"\nrate_limit = "600 per minute"\nmax_concurrent = 4\n[[clients]]\nname = "other_app"\ntoken = "another_token_of_a_client"\n`,
});
await dashboard.api(`keys/${(await dashboard.key("paused")).id}/pause`, "POST", { reason: "invoice" });
assert.equal((await dashboard.speak("a".repeat(850), CLIENT_TOKEN)).status, 200);
for (let request = 0; request < 4; request++) assert.equal((await dashboard.speak("Hello", CLIENT_TOKEN)).status, 200);
await dashboard.waitForAttempts(5);
const keyState = async (name) => (await dashboard.key(name)).state;
await waitUntil(async () => (await keyState(LONG_NAME)) === "near_limit");
assert.deepEqual(await Promise.all(["limited", "invalid", "exhausted", "paused"].map(keyState)), ["rate_limited", "invalid", "exhausted", "paused"]);
const { id } = await dashboard.key(LONG_NAME);
const { id: limitedId } = await dashboard.key("limited");

/** The paths of the pages, and the number of charts with data on each page. */
const PAGES = {
  "": 1, keys: 0, "keys?state=exhausted&q=e": 0, "keys?q=no-such-key": 0, [`key?id=${id}`]: 0, [`key?id=${limitedId}`]: 0, "key?id=unknown": 0,
  live: 0, usage: 0, "usage?by=hour&since=1d": 0, "usage?by=key&since=30d": 0, "usage?by=client&since=365d": 0, "usage?by=model": 0, "usage?by=route": 0,
  clients: 0, connect: 0, system: 0, login: 0, "no-such-page": 0,
};
const SCHEMES = ["light", "dark"];
const WIDTHS = [360, 1280];

const session = await signIn(dashboard);
const storageState = await session.storageState();
await session.close();

/** Returns the titles of the charts that should be drawn, because their tables have at least two rows, and are not. */
const findUndrawnCharts = () =>
  [...document.querySelectorAll("figure.chart")]
    .filter((figure) => figure.querySelectorAll("tbody tr").length >= 2)
    .filter((figure) => {
      const canvas = figure.querySelector("canvas");
      if (!canvas || canvas.width === 0) return true;
      const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      return !pixels.some((value) => value > 0);
    })
    .map((figure) => figure.querySelector("h2").textContent);

for (const colorScheme of SCHEMES) {
  for (const width of WIDTHS) {
    test(`the pages in ${colorScheme} at ${width} pixels`, async (t) => {
      const options = { storageState, colorScheme, viewport: { width, height: 900 }, baseURL: `${dashboard.url}/_/` };
      // The content security policy of the pages blocks the axe script, so the script runs in a context without the
      // policy.
      const [context, auditContext] = await Promise.all([false, true].map((bypassCSP) => browser.newContext({ ...options, bypassCSP })));
      t.after(() => Promise.all([context.close(), auditContext.close()]));
      const [page, auditPage] = await Promise.all([openPage(context), auditContext.newPage()]);
      for (const [path, chartCount] of Object.entries(PAGES)) {
        await t.test(`/_/${path}`, async () => {
          page.problems.length = 0;
          const response = await page.goto(path);
          assert.equal(response.status(), path === "no-such-page" ? 404 : 200);
          const layout = await page.evaluate(() => ({
            width: document.documentElement.scrollWidth, headings: document.querySelectorAll("h1").length, canvases: document.querySelectorAll("canvas").length,
          }));
          assert.ok(layout.width <= width, `the page must not be ${layout.width} pixels wide`);
          assert.equal(layout.headings, 1);
          assert.ok(layout.canvases >= chartCount, `the page must have ${chartCount} charts, not ${layout.canvases}`);
          assert.deepEqual(await page.evaluate(findUndrawnCharts), []);
          // Chromium reports the status of the page itself as an error.
          const problems = page.problems.filter((problem) => !(path === "no-such-page" && problem.includes("404")));
          assert.deepEqual(problems, []);
          await auditPage.goto(path);
          assert.deepEqual(await auditAccessibility(auditPage), []);
        });
      }
    });
  }
}
