// Tests how dashboard sessions start with a link or a code, how they end and expire, and that they survive a restart.
// After too many wrong codes, further codes are refused.

import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { browser, openPage, signIn } from "./browser.mjs";
import { startDashboard } from "./dashboard.mjs";

const LOGIN_URL = /\/_\/login$/;

test("a link opens the dashboard once, and its code is in no URL afterwards", async (t) => {
  const dashboard = await startDashboard(t);
  const link = await dashboard.createLink();
  assert.match(link, /^http:\/\/127\.0\.0\.1:\d+\/_\/login#kcd_\w+$/);
  const code = new URL(link).hash.slice(1);
  const context = await browser.newContext();
  t.after(() => context.close());
  const page = await openPage(context);
  const urls = [];
  page.on("request", (request) => urls.push(request.url()));
  await page.goto(link);
  await page.waitForURL(`${dashboard.url}/_/`);
  assert.ok(urls.every((url) => !url.includes(code)), `no URL must contain the code: ${urls.join("\n")}`);
  assert.deepEqual(page.problems, []);

  const [cookie] = await context.cookies();
  const { port } = new URL(dashboard.url);
  assert.deepEqual([cookie.name, cookie.httpOnly, cookie.sameSite, cookie.secure], [`keychoir_session_${port}`, true, "Strict", false]);
  assert.equal(await page.evaluate(() => document.cookie), "");

  const other = await browser.newContext();
  t.after(() => other.close());
  const secondPage = await openPage(other);
  await secondPage.goto(link);
  await secondPage.getByRole("alert").filter({ hasText: "was used already" }).waitFor();
  assert.deepEqual(await other.cookies(), []);
  for (const [file, content] of dashboard.readStoredFiles()) assert.ok(!content.includes(code) && !content.includes(cookie.value), `${file} must not contain a secret of a session`);
});

test("the eleventh wrong code within a minute is refused with 429", async (t) => {
  const dashboard = await startDashboard(t);
  const context = await browser.newContext();
  t.after(() => context.close());
  const page = await openPage(context);
  await page.goto(`${dashboard.url}/_/login`);
  const statuses = [];
  for (let attempt = 0; attempt < 11; attempt++) {
    await page.getByLabel("Code").fill(`kcd_guess_${attempt}`);
    const [response] = await Promise.all([page.waitForResponse((response) => response.request().method() === "POST"), page.getByRole("button", { name: "Sign in" }).click()]);
    statuses.push(response.status());
    await page.getByRole("alert").waitFor();
  }
  assert.deepEqual(statuses, [...Array(10).fill(403), 429]);
  assert.match(await page.getByRole("alert").textContent(), /Too many wrong codes/);
});

test("an ended session leads to the login page", async (t) => {
  const dashboard = await startDashboard(t);
  const options = { baseURL: `${dashboard.url}/_/` };
  await t.test("after a sign out in another tab", async () => {
    const context = await signIn(dashboard, options);
    const [page, other] = await Promise.all([openPage(context), openPage(context)]);
    await Promise.all([page.goto("keys"), other.goto("")]);
    await other.getByRole("button", { name: "Sign out" }).click();
    await other.waitForURL(LOGIN_URL);
    assert.deepEqual(await context.cookies(), []);
    const changes = await dashboard.changes();
    await page.getByRole("button", { name: "Pause first" }).click();
    await page.waitForURL(LOGIN_URL);
    assert.deepEqual(await dashboard.changes(), changes, "the action of an ended session must not be performed");
    await context.close();
  });
  await t.test("without its cookie", async () => {
    const context = await signIn(dashboard, options);
    const page = await openPage(context);
    for (const path of ["", "keys", "key?id=x", "live", "usage", "usage.csv", "clients", "connect", "system", "nothing", "a/b/c"]) {
      assert.ok([200, 404].includes((await context.request.get(path)).status()), `/_/${path} must respond in a session`);
      const cookies = await context.cookies();
      await context.clearCookies();
      await page.goto(path);
      assert.match(page.url(), LOGIN_URL);
      await context.addCookies(cookies);
    }
    await context.close();
  });
  await t.test("on an open page, whose stream ends", async () => {
    const context = await signIn(dashboard, options);
    const [page, other] = await Promise.all([openPage(context), openPage(context)]);
    const opened = page.waitForResponse((response) => response.url().includes("/_/events"));
    await page.goto("live");
    await opened;
    await other.goto("");
    await other.getByRole("button", { name: "Sign out" }).click();
    await other.waitForURL(LOGIN_URL);
    await dashboard.speak();
    await page.waitForURL(LOGIN_URL);
    await context.close();
  });
  await t.test("after another admin token", async () => {
    const context = await signIn(dashboard, options);
    const page = await openPage(context);
    dashboard.adminToken = "kca_another_admin_token_of_the_test";
    writeFileSync(dashboard.tokenFile, dashboard.adminToken);
    await dashboard.configure(dashboard.baseConfig);
    await page.goto("keys");
    assert.match(page.url(), LOGIN_URL);
    const newContext = await signIn(dashboard, options);
    await Promise.all([context.close(), newContext.close()]);
  });
});

test("a session expires while its pages are open", async (t) => {
  const dashboard = await startDashboard(t);
  const context = await signIn(dashboard, { baseURL: `${dashboard.url}/_/` });
  t.after(() => context.close());
  const [livePage, formPage] = await Promise.all([openPage(context), openPage(context)]);
  await Promise.all([livePage.goto("live"), formPage.goto("clients")]);
  // The test sets the stored start of the session back by 7 days, the default duration, instead of waiting for its end.
  const file = join(dashboard.directory, "dashboard_sessions.json");
  const stored = readFileSync(file, "utf8");
  const expired = stored.replace(/"started_at_ms":(\d+)/, (_, start) => `"started_at_ms":${start - 7 * 86_400_000}`);
  assert.notEqual(expired, stored);
  writeFileSync(file, expired);
  await dashboard.restart();
  // The page with the live list connects again, and its ended session leads it to the login page.
  await livePage.waitForURL(LOGIN_URL);
  await formPage.getByLabel("Name", { exact: true }).fill("reader");
  await formPage.getByRole("button", { name: "Add the client" }).click();
  await formPage.waitForURL(LOGIN_URL);
  assert.equal(await dashboard.client("reader"), undefined);
});

test("sessions survive a restart of Keychoir", async (t) => {
  const dashboard = await startDashboard(t);
  const context = await signIn(dashboard, { baseURL: `${dashboard.url}/_/` });
  t.after(() => context.close());
  const unusedCode = new URL(await dashboard.createLink()).hash.slice(1);
  await dashboard.restart();
  const page = await openPage(context);
  await page.goto("keys");
  assert.equal(page.url(), `${dashboard.url}/_/keys`);
  await page.getByRole("button", { name: "Pause first" }).click();
  await page.waitForURL(/done=paused$/);
  // Codes are kept in memory only.
  const response = await context.request.post("login", { form: { code: unusedCode }, headers: { origin: dashboard.url } });
  assert.equal(response.status(), 403);
});
