// Tests every action of the forms of the dashboard: its effect in the admin API, its notice and its record. Each change
// is recorded once, a check and a refused action change nothing, and a new token is shown once.

import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { after, test } from "node:test";
import { openPage, signIn } from "./browser.mjs";
import { FIRST_KEY, SECOND_KEY, SPARE_KEY, startDashboard } from "./dashboard.mjs";

const APP_TOKEN = "token_of_the_configured_client";
const config = `[[clients]]\nname = "app"\ntoken = "${APP_TOKEN}"\n`;

const dashboard = await startDashboard({ after }, { config });
const context = await signIn(dashboard, { baseURL: `${dashboard.url}/_/` });
const page = await openPage(context);
after(() => context.close());

/** Performs an action by calling `act`. Asserts that it was recorded once, with the given name and target. */
async function expectChange(action, target, act) {
  const before = await dashboard.changes();
  await act();
  const added = (await dashboard.changes()).slice(0, -before.length || undefined);
  assert.equal(added.length, 1, `the action must be recorded once: ${JSON.stringify(added)}`);
  const [change] = added;
  assert.deepEqual([change.action, change.target, change.actor, change.address], [action, target, "dashboard", "127.0.0.1"]);
  assert.deepEqual(page.problems, []);
}

/**
 * Performs an action that Keychoir must refuse with `status`. Asserts that nothing was recorded. Resolves with the
 * message on the page and the text of the response.
 */
async function expectRefusal(status, act) {
  const before = await dashboard.changes();
  assert.deepEqual(page.problems, []);
  const [response] = await Promise.all([page.waitForResponse((response) => response.request().method() === "POST"), act()]);
  await page.getByRole("alert").waitFor();
  // Chromium reports the status of the page itself as an error.
  page.problems.splice(0);
  assert.equal(response.status(), status);
  assert.deepEqual(await dashboard.changes(), before);
  return { message: await page.getByRole("alert").textContent(), content: await response.text() };
}

const button = (name) => page.getByRole("button", { name, exact: true });
/** Presses a button, and waits until the page has a URL that ends with `path`. */
const press = async (name, path) => {
  await button(name).click();
  await page.waitForURL(new RegExp(`${path.replace("?", "\\?")}$`));
};
/** Returns the message about the last action. */
const readNotice = () => page.getByRole("status").filter({ hasText: /./ }).first().textContent();

test("a key is paused and resumed in the list", async () => {
  const { id, name } = await dashboard.key("first");
  await page.goto("keys");
  await expectChange("key_paused", name, () => press("Pause first", "keys?done=paused"));
  assert.match(await readNotice(), /The key is paused/);
  const paused = await dashboard.key("first");
  assert.deepEqual([paused.paused, paused.state, paused.until], [true, "paused", null]);
  assert.equal(await page.locator(`tr[data-key="${id}"] [data-state]`).textContent(), "‖ paused");
  assert.ok((await dashboard.speak("Hello", APP_TOKEN)).ok, "the other key must serve the request");
  await expectChange("key_resumed", name, () => press("Resume first", "keys?done=resumed"));
  assert.equal((await dashboard.key("first")).state, "active");
});

test("a key is paused with a reason and an end on its page", async () => {
  const { id, name } = await dashboard.key("second");
  await page.goto(`key?id=${id}`);
  await page.getByLabel("Reason").fill("an invoice <b>is</b> disputed");
  await page.getByLabel("Duration").selectOption("8h");
  const before = Date.now();
  await expectChange("key_paused", name, () => press("Pause", "keys?done=paused"));
  const paused = await dashboard.key("second");
  assert.match(paused.reason, /an invoice <b>is<\/b> disputed/);
  const hours = (Date.parse(paused.until) - before) / 3_600_000;
  assert.ok(hours > 7.99 && hours < 8.1, `the pause must last 8 hours: ${paused.until}`);
  await page.goto(`key?id=${id}`);
  assert.match(await page.locator("dl.facts").first().textContent(), /an invoice <b>is<\/b> disputed/, "the reason must be shown as text and not as HTML");
  await expectChange("key_resumed", name, () => press("Resume", "keys?done=resumed"));
});

test("a key is checked at the provider", async () => {
  const changes = await dashboard.changes();
  await page.goto("keys");
  await button("Check first").click();
  await page.getByText("Check of first: valid").waitFor();
  assert.match(await readNotice(), /Credits left20,000|Credits left19,\d{3}/);
  await dashboard.setFault(SECOND_KEY, "invalid");
  await page.goto(`key?id=${(await dashboard.key("second")).id}`);
  await button("Check at ElevenLabs").click();
  await page.getByText(/Check of second: .*HTTP 401/).waitFor();
  await dashboard.setFault(SECOND_KEY, "pass");
  assert.deepEqual(await dashboard.changes(), changes, "a check must not be recorded as a change");
});

test("a key is added and removed", async () => {
  await page.goto("keys");
  await page.getByLabel("Name", { exact: true }).fill("spare");
  await page.getByLabel("API key").fill(` ${SPARE_KEY} `);
  await page.getByLabel("Workspace (").fill("studio");
  await expectChange("key_added", "spare", () => press("Add the key", "keys?done=added"));
  const { id, workspace, removable } = await dashboard.key("spare");
  assert.deepEqual([workspace, removable], ["studio", true]);
  await page.goto(`key?id=${id}`);
  await page.getByText("Remove this key").click();
  await expectChange("key_removed", "spare", () => press("Remove", "keys?done=removed"));
  assert.equal(await dashboard.key("spare"), undefined);
  await page.goto(`key?id=${id}`);
  await page.getByText("The pool has no such key.").waitFor();
});

test("a key of the configuration cannot be removed", async () => {
  await page.goto(`key?id=${(await dashboard.key("first")).id}`);
  assert.equal(await page.getByText("can be removed only there").count(), 1);
  assert.equal(await page.getByText("Remove this key").count(), 0);
});

for (const [problem, name, key, status, expected] of [
  ["a duplicate name", "first", SPARE_KEY, 409, /first/],
  ["a duplicate key", "another", FIRST_KEY, 409, /key/],
  ["a malformed key", "another", "sk_with a space_canary", 400, /key/],
  ["a key with HTML", "another", "xx_\"'<script>alert(1)</script>", 422, /key/],
]) {
  test(`${problem} is refused with a message and without the key`, async () => {
    await page.goto("keys");
    await page.getByLabel("Name", { exact: true }).fill(name);
    await page.getByLabel("API key").fill(key);
    const { message, content } = await expectRefusal(status, () => button("Add the key").click());
    assert.match(message, expected);
    assert.ok(!content.includes(key) && !content.includes(key.slice(4, 20)), "the response must not contain the key");
  });
}

test("the form refuses a name that Keychoir would refuse", async () => {
  await page.goto("keys");
  await page.getByLabel("API key").fill(SPARE_KEY);
  for (const [name, isValid] of [["a-b_9", true], ["A", false], ["a.b", false], ["a b", false], ["a/b", false]]) {
    await page.getByLabel("Name", { exact: true }).fill(name);
    assert.equal(await page.getByLabel("Name", { exact: true }).evaluate((input) => input.checkValidity()), isValid, `the name ${name} must be ${isValid ? "accepted" : "refused"}`);
  }
});

/** Resolves with the new client token that the page shows. */
const readShownToken = async () => {
  await page.locator("code.secret").waitFor();
  return page.locator("code.secret").textContent();
};
/** Resolves with whether the proxy serves a request with this client token. */
const isServed = async (token) => (await dashboard.speak("Hello", token)).status === 200;
/** Asserts that no other page contains a token that was shown. */
async function expectShownOnce(token) {
  for (const path of ["", "keys", "live", "usage?by=client", "clients", "connect", "system", "clients?done=revoked"]) {
    const response = await context.request.get(path);
    assert.equal(response.status(), 200);
    assert.ok(!(await response.text()).includes(token), `/_/${path} must not contain the token`);
  }
}

let token;
test("a client is added, and its token is shown once", async () => {
  await page.goto("clients");
  await page.getByLabel("Name", { exact: true }).fill("reader");
  await page.getByLabel("Quota (").fill("50 requests per day");
  await page.getByLabel("Rate limit").fill("600 per minute");
  await expectChange("client_added", "reader", async () => {
    await button("Add the client").click();
    token = await readShownToken();
  });
  assert.ok(await isServed(token), "the token must be valid");
  const client = await dashboard.client("reader");
  assert.deepEqual([client.quota.limit, client.rate_limit], ["50 requests per day", "600 per minute"]);
  await expectShownOnce(token);
});

test("a client with a used name or an invalid quota is refused", async () => {
  for (const [name, quota, status, expected] of [["reader", "", 409, /reader|name/], ["writer", "a lot", 422, /quota/]]) {
    await page.goto("clients");
    await page.getByLabel("Name", { exact: true }).fill(name);
    await page.getByLabel("Quota (").fill(quota);
    const { message } = await expectRefusal(status, () => button("Add the client").click());
    assert.match(message, expected);
  }
});

/** Opens the actions of a client. Returns its row. */
async function openActions(name) {
  await page.goto("clients");
  const row = page.getByRole("row").filter({ has: page.getByRole("rowheader", { name, exact: true }) });
  await row.locator("summary").click();
  return row;
}

test("a token is rotated, and the previous token is valid during the grace period", async () => {
  for (const [grace, isPreviousServed] of [["1h", true], ["0s", false]]) {
    const previous = token;
    const row = await openActions("reader");
    await row.getByLabel("The previous token").selectOption(grace);
    await expectChange("client_rotated", "reader", async () => {
      await row.getByRole("button", { name: "Make a new token" }).click();
      token = await readShownToken();
    });
    assert.notEqual(token, previous);
    assert.deepEqual([await isServed(token), await isServed(previous)], [true, isPreviousServed], `the previous token must ${isPreviousServed ? "stay" : "not stay"} valid with the grace period ${grace}`);
    await expectShownOnce(token);
  }
});

test("a client is revoked", async () => {
  const row = await openActions("reader");
  await expectChange("client_revoked", "reader", async () => {
    await row.getByRole("button", { name: "Revoke the client" }).click();
    await page.waitForURL(/clients\?done=revoked$/);
  });
  assert.equal((await dashboard.speak("Hello", token)).status, 401);
  assert.equal(await dashboard.client("reader"), undefined);
});

test("a button reloads the configuration", async () => {
  writeFileSync(dashboard.configFile, `${dashboard.baseConfig}\n[pool]\nnear_limit_ratio = 0.55\n`);
  await page.goto("system");
  await expectChange("reloaded", null, () => press("Read the configuration again", "system?done=reloaded"));
  const ratio = (await dashboard.api("config")).settings.find(({ name }) => name === "pool.near_limit_ratio");
  assert.equal(ratio.value, "0.55");
  writeFileSync(dashboard.configFile, `${dashboard.baseConfig}\n[pool]\nnear_limit_ratio = "high"\n`);
  await page.goto("system");
  const { message } = await expectRefusal(422, () => button("Read the configuration again").click());
  assert.match(message, /near_limit_ratio|configuration/);
  writeFileSync(dashboard.configFile, dashboard.baseConfig);
});

test("a reload of the page does not repeat an action", async () => {
  await page.goto("keys");
  await press("Pause first", "keys?done=paused");
  const changes = await dashboard.changes();
  await page.reload();
  assert.deepEqual(await dashboard.changes(), changes);
  await press("Resume first", "keys?done=resumed");
});

test("a URL with an unknown action shows no notice", async () => {
  await page.goto("keys?done=<b>x</b>");
  assert.equal(await page.locator(".notice").count(), 0);
});
