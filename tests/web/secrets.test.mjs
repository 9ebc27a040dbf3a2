// Tests that no response of the dashboard and no stored file contains a secret, and that the CSV download contains the
// same sums as the page.

import assert from "node:assert/strict";
import { test } from "node:test";
import { signIn } from "./browser.mjs";
import { ADMIN_TOKEN, FIRST_KEY, SECOND_KEY, SPARE_KEY, startDashboard } from "./dashboard.mjs";

const CLIENT_TOKEN = "token_canary_of_the_client_8841";
const SPOKEN_TEXT = "a spoken canary text 2077";

/** Opens a stream of events. `finish` reads it until it contains `text`, and resolves with its headers and content. */
async function openEvents(url, headers, text) {
  const abort = new AbortController();
  const response = await fetch(url, { headers, signal: abort.signal });
  assert.equal(response.status, 200);
  let content = [...response.headers].join();
  return {
    async finish() {
      for await (const chunk of response.body) {
        content += Buffer.from(chunk).toString("latin1");
        if (content.includes(text)) break;
      }
      abort.abort();
      return content;
    },
  };
}

test("no response of the dashboard contains a secret", async (t) => {
  const dashboard = await startDashboard(t, { config: `[[clients]]\nname = "app"\ntoken = "${CLIENT_TOKEN}"\n` });
  const context = await signIn(dashboard, { baseURL: `${dashboard.url}/_/` });
  t.after(() => context.close());
  const [cookie] = await context.cookies();
  const headers = { cookie: `${cookie.name}=${cookie.value}` };
  const events = await openEvents(`${dashboard.url}/_/events`, headers, "event: request");
  // The message of the refusal contains the key.
  await dashboard.setFault(FIRST_KEY, `answer=401/{"detail":{"status":"invalid_api_key","message":"${FIRST_KEY} is wrong"}}`);
  assert.equal((await dashboard.speak(SPOKEN_TEXT, CLIENT_TOKEN)).status, 200);
  assert.equal((await dashboard.speak(SPOKEN_TEXT, "a_wrong_token_canary")).status, 401);
  await dashboard.waitForAttempts(2);

  const responses = new Map([["events", await events.finish()]]);
  const post = (path, form) => context.request.post(path, { form, headers: { origin: dashboard.url } });
  const added = await post("keys", { action: "add", name: "spare", key: SPARE_KEY });
  responses.set("added", `${added.url()}${JSON.stringify(added.headers())}${await added.text()}`);
  const ids = (await dashboard.keys()).map(({ id }) => id);
  assert.equal(ids.length, 3);
  const checked = await post("keys", { action: "check", id: ids[0] });
  responses.set("checked", await checked.text());
  const groupings = ["day", "hour", "key", "client", "user", "region", "model", "route"];
  const paths = [
    "", "keys", ...ids.map((id) => `key?id=${id}`), "live", "live?failed=1", ...groupings.flatMap((grouping) => [`usage?by=${grouping}`, `usage.csv?by=${grouping}`]), "clients", "connect", "system", "login", "nothing",
    ...["app.js", "app.css", "icon.svg", "uplot.js", "uplot.css"].map((asset) => `assets/${asset}`),
  ];
  for (const path of paths) {
    const response = await context.request.get(path);
    assert.equal(response.status(), path === "nothing" ? 404 : 200, `/_/${path} must exist, except /_/nothing`);
    responses.set(path, JSON.stringify(response.headers()) + (await response.text()));
  }
  const canaries = [ADMIN_TOKEN, FIRST_KEY, SECOND_KEY, SPARE_KEY, CLIENT_TOKEN, "a_wrong_token_canary", SPOKEN_TEXT, cookie.value];
  for (const [name, content] of responses) {
    for (const canary of canaries) assert.ok(!content.includes(canary), `${name} must not contain ${canary}`);
  }
  // The responses were not empty.
  assert.match(responses.get(`key?id=${ids[0]}`), /invalid_api_key|invalid/);
  assert.match(responses.get("events"), /event: request/);
  // Only the configuration file may contain the token of the client.
  for (const [file, content] of dashboard.readStoredFiles()) {
    const found = [SPOKEN_TEXT, cookie.value, ...(file === dashboard.configFile ? [] : [CLIENT_TOKEN])].filter((canary) => content.includes(canary));
    assert.deepEqual(found, [], `${file} must contain no secret`);
  }
});

test("the download contains the sums of the page", async (t) => {
  const dashboard = await startDashboard(t);
  const context = await signIn(dashboard, { baseURL: `${dashboard.url}/_/`, acceptDownloads: true });
  t.after(() => context.close());
  for (const characters of [3, 5, 11]) assert.equal((await dashboard.speak("a".repeat(characters))).status, 200);
  await dashboard.waitForAttempts(3);
  const page = await context.newPage();
  await page.goto("usage?by=route&since=1d");
  const [download] = await Promise.all([page.waitForEvent("download"), page.getByRole("link", { name: "Download CSV" }).click()]);
  assert.equal(download.suggestedFilename(), "keychoir-usage-route.csv");
  const chunks = [];
  for await (const chunk of await download.createReadStream()) chunks.push(chunk);
  const [head, ...rows] = Buffer.concat(chunks).toString().trimEnd().split("\r\n").map((line) => line.split(","));
  assert.deepEqual(head, ["route", "credits", "attempts", "served", "failed", "characters", "request_bytes", "response_bytes"]);
  const { usage } = await dashboard.api("usage?by=route");
  const expected = usage.map((row) => [row.route, row.credits, row.attempts, row.served, row.failed, row.characters, row.request_bytes, row.response_bytes].map(String));
  assert.deepEqual(rows, expected);
  assert.deepEqual(rows.map(([, credits, attempts]) => [credits, attempts]), [["19", "3"]]);
  const cells = await page.locator("tbody tr").first().locator("td.number").allTextContents();
  assert.equal(cells[0], "19");
});
