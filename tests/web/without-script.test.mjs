// Tests that the links, forms and filters of the dashboard work in a browser without JavaScript.

import assert from "node:assert/strict";
import { test } from "node:test";
import { browser, openPage } from "./browser.mjs";
import { startDashboard } from "./dashboard.mjs";

test("the dashboard works without JavaScript", async (t) => {
  const dashboard = await startDashboard(t);
  await dashboard.speak("Hello");
  await dashboard.waitForAttempts(1);
  const context = await browser.newContext({ javaScriptEnabled: false, baseURL: `${dashboard.url}/_/` });
  t.after(() => context.close());
  const page = await openPage(context);

  await page.goto("");
  assert.match(page.url(), /\/_\/login$/);
  await page.getByLabel("Code").fill(new URL(await dashboard.createLink()).hash.slice(1));
  await page.getByRole("button", { name: "Sign in" }).click();
  await page.waitForURL(`${dashboard.url}/_/`);

  const expectedContent = {
    Overview: /Yes: all 2 keys can serve requests\..*Credits left\s*39,995/s, Keys: /first.*active.*of 20,000/s, Live: /POST \/v1\/text-to-speech\/\{id\}.*200 served/s,
    Usage: /\t5\t\t?1\t1\t0\t5\t|\b5\b[^]*\b1\b[^]*\b1\b/, Clients: /No clients are configured/, Connect: new RegExp(`base_url="${dashboard.url}"`), System: /Settings that are set|settings/,
  };
  for (const [name, content] of Object.entries(expectedContent)) {
    await page.getByRole("navigation", { name: "Pages" }).getByRole("link", { name }).click();
    await page.locator("a[aria-current=page]", { hasText: name }).waitFor();
    assert.match(await page.locator("main").innerText(), content, `the page ${name} must have its content`);
    assert.deepEqual(page.problems, [], `the page ${name} must cause no error`);
  }
  // Parts that need the script are hidden.
  await page.goto("live");
  assert.equal(await page.locator("[data-script]:visible").count(), 0);
  await page.getByLabel("Only").check();
  await page.getByRole("button", { name: "Reload" }).click();
  await page.waitForURL(/live\?.*failed=1/);
  await page.getByText("No request has ended yet.").waitFor();
  // A chart has its values in a table.
  await page.goto("");
  await page.locator("figure.chart summary").first().click();
  assert.ok((await page.locator("figure.chart").first().getByRole("row").count()) >= 2);

  await page.goto("keys");
  await page.getByRole("button", { name: "Pause first" }).click();
  await page.waitForURL(/keys\?done=paused$/);
  assert.equal((await dashboard.key("first")).state, "paused");
  await page.getByLabel("State").selectOption("paused");
  await page.getByRole("button", { name: "Filter" }).click();
  assert.match(await page.locator("form.filter").innerText(), /1 of 2 keys/);
  await page.getByRole("button", { name: "Resume first" }).click();
  await page.waitForURL(/keys\?done=resumed$/);
  assert.equal((await dashboard.key("first")).state, "active");

  await page.goto("usage");
  await page.getByLabel("By").selectOption("route");
  await page.getByRole("button", { name: "Show" }).click();
  await page.getByRole("rowheader", { name: "/v1/text-to-speech/{id}" }).waitFor();

  await page.getByRole("button", { name: "Sign out" }).click();
  await page.waitForURL(/\/_\/login$/);
});
