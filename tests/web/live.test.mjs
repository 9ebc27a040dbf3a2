// Tests the parts of pages that change without an action of the operator: the list of ended requests with its pause and
// filter, the counts of the overview, and the states of keys. A hidden page closes its stream of events.

import assert from "node:assert/strict";
import { after, test } from "node:test";
import { openPage, signIn } from "./browser.mjs";
import { FIRST_KEY, SECOND_KEY, startDashboard } from "./dashboard.mjs";

const dashboard = await startDashboard({ after }, {
  keys: [{ key: FIRST_KEY, name: "first", credits: 20_000 }, { key: SECOND_KEY, name: "second", credits: 20_000 }],
  config: `[[clients]]\nname = "app"\ntoken = "token_of_the_app"\n[[clients]]\nname = "reader"\ntoken = "token_of_the_reader"\n`,
});
const context = await signIn(dashboard, { baseURL: `${dashboard.url}/_/` });
after(() => context.close());

/** Opens a page. Resolves with the page when its stream of events is open. */
async function openLivePage(path) {
  const page = await openPage(context);
  const opened = page.waitForResponse((response) => response.url().includes("/_/events"));
  await page.goto(path);
  assert.equal((await opened).status(), 200);
  return page;
}

/** Returns the visible rows of the list of requests. */
const requestRows = (page) => page.locator("[data-requests] tr[data-request]:visible");

test("a request appears with the reasons of its retries", async () => {
  const page = await openLivePage("live");
  const before = await requestRows(page).count();
  // The quota poller has a different route, so that only the request finds the fault.
  await dashboard.setFault(FIRST_KEY, "invalid");
  const response = await dashboard.speak("Hello there", "token_of_the_app");
  const id = response.headers.get("x-request-id");
  await page.locator(`[data-request="${id}"]`).waitFor();
  const cells = await page.locator(`[data-request="${id}"] td`).allTextContents();
  assert.match(cells.join("|"), /POST \/v1\/text-to-speech\/\{id\}\|app\|(second|sk_s\S+0002)\|200 served\|2 after invalid key\|\d+ ms\|11$/);
  assert.equal(await requestRows(page).count(), before + 1);
  await dashboard.setFault(FIRST_KEY, "pass");
  // After a reload of the page, Keychoir renders the same request.
  await dashboard.waitForAttempts(2);
  await page.reload();
  assert.match((await page.locator(`[data-request="${id}"] td`).allTextContents()).join("|"), /\|app\|second\|200 served\|2 after .+\|11$/);
  assert.deepEqual(page.problems, []);
  await page.close();
});

test("the list is paused and continued", async () => {
  const page = await openLivePage("live");
  const before = await requestRows(page).count();
  await page.getByRole("button", { name: "Pause" }).click();
  assert.equal(await page.getByRole("button", { name: "Continue" }).getAttribute("aria-pressed"), "true");
  await dashboard.speak("one", "token_of_the_app");
  await dashboard.speak("two", "token_of_the_app");
  await page.getByText("2 waiting").waitFor();
  assert.equal(await requestRows(page).count(), before);
  await page.getByRole("button", { name: "Continue" }).click();
  assert.equal(await requestRows(page).count(), before + 2);
  assert.equal(await page.locator("[data-status]").textContent(), "");
  await page.close();
});

test("the filter also applies to later requests", async () => {
  const page = await openLivePage("live");
  await page.getByLabel("Filter").fill("READER");
  assert.equal(await requestRows(page).count(), 0);
  await dashboard.speak("hidden", "token_of_the_app");
  const response = await dashboard.speak("shown", "token_of_the_reader");
  await page.locator(`[data-request="${response.headers.get("x-request-id")}"]`).waitFor();
  assert.equal(await requestRows(page).count(), 1);
  await page.getByLabel("Filter").fill("");
  assert.ok((await requestRows(page).count()) >= 2);
  await page.getByLabel("Only").check();
  assert.ok((await requestRows(page).allTextContents()).every((row) => / after /.test(row)), "only requests with failed attempts must be shown");
  await page.close();
});

test("the overview shows requests that are running", async () => {
  const page = await openLivePage("");
  await dashboard.setFault(SECOND_KEY, "stall=2s");
  await dashboard.setFault(FIRST_KEY, "stall=2s");
  const response = dashboard.speak("running", "token_of_the_app");
  await page.locator('[data-field="requests.in_flight"] data', { hasText: /^1$/ }).waitFor();
  await response;
  await page.locator('[data-field="requests.in_flight"] data', { hasText: /^0$/ }).waitFor();
  await dashboard.setFault(SECOND_KEY, "pass");
  await dashboard.setFault(FIRST_KEY, "pass");
  await page.close();
});

test("the pause of another operator appears, but not while a form is being filled in", async () => {
  const { id } = await dashboard.key("second");
  const page = await openLivePage("keys");
  const formPage = await openLivePage("keys");
  await formPage.getByLabel("Name", { exact: true }).fill("half");
  await dashboard.api(`keys/${id}/pause`, "POST", {});
  await page.locator(`tr[data-key="${id}"] [data-state="paused"]`).waitFor();
  assert.equal(await formPage.getByLabel("Name", { exact: true }).inputValue(), "half");
  await formPage.getByLabel("Name", { exact: true }).blur();
  await formPage.locator(`tr[data-key="${id}"] [data-state="paused"]`).waitFor();
  await dashboard.api(`keys/${id}/resume`, "POST", {});
  await page.locator(`tr[data-key="${id}"] [data-state="active"]`).waitFor();
  await Promise.all([page.close(), formPage.close()]);
});

test("a hidden page closes its stream of events", async () => {
  const page = await context.newPage();
  // Chromium without a window never hides a page, so the test replaces `document.hidden`.
  await page.addInitScript(() => {
    let isHidden = false;
    Object.defineProperty(document, "hidden", { get: () => isHidden });
    self.setHidden = (hidden) => {
      isHidden = hidden;
      document.dispatchEvent(new Event("visibilitychange"));
    };
  });
  const isEventStream = (request) => request.url().includes("/_/events");
  const opened = page.waitForRequest(isEventStream);
  await page.goto("live");
  await opened;
  const ended = Promise.race([page.waitForEvent("requestfailed", isEventStream), page.waitForEvent("requestfinished", isEventStream)]);
  await page.evaluate(() => setHidden(true));
  await ended;
  const reopened = page.waitForRequest(isEventStream);
  await page.evaluate(() => setHidden(false));
  await reopened;
  await page.close();
});
