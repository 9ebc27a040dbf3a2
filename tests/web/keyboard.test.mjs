// Tests that the actions, forms and tables of the dashboard can be used with the keyboard alone, and that each focused
// element is visible and has an outline.

import assert from "node:assert/strict";
import { test } from "node:test";
import { openPage, signIn } from "./browser.mjs";
import { startDashboard } from "./dashboard.mjs";

/** Resolves with the tag, the name, the visibility and the outline width in pixels of the focused element. */
const describeFocused = (page) =>
  page.evaluate(() => {
    const element = document.activeElement;
    const style = getComputedStyle(element);
    const box = element.getBoundingClientRect();
    const name = element.getAttribute("aria-label") ?? element.closest("label")?.innerText ?? element.innerText;
    return { tag: element.localName, name: name?.split("\n")[0].trim(), isVisible: box.width > 1 && box.height > 1, outline: style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth) };
  });

/** Presses Tab until an element with this tag and name has the focus. Each focused element must have an outline. */
async function tabTo(page, tag, name) {
  for (let step = 0; step < 100; step++) {
    await page.keyboard.press("Tab");
    const element = await describeFocused(page);
    if (element.tag === "body") continue;
    assert.ok(element.isVisible && element.outline >= 2, `the focus must be visible: ${JSON.stringify(element)}`);
    if (element.tag === tag && name.test(element.name)) return;
  }
  assert.fail(`${tag} ${name} must be reached within 100 steps`);
}

test("the actions of the dashboard can be used with the keyboard alone", async (t) => {
  const dashboard = await startDashboard(t, { config: `[[clients]]\nname = "app"\ntoken = "token_of_the_app"\n` });
  const context = await signIn(dashboard, { baseURL: `${dashboard.url}/_/` });
  t.after(() => context.close());
  const page = await openPage(context);

  await page.goto("keys");
  await page.keyboard.press("Tab");
  const first = await describeFocused(page);
  assert.deepEqual([first.tag, first.name, first.isVisible], ["a", "Skip to content", true]);
  await page.keyboard.press("Enter");
  await tabTo(page, "input", /Name, short key/);
  await tabTo(page, "button", /^Pause first$/);
  await page.keyboard.press("Enter");
  await page.waitForURL(/done=paused$/);
  assert.equal((await dashboard.key("first")).state, "paused");
  await tabTo(page, "button", /^Resume first$/);
  await page.keyboard.press("Space");
  await page.waitForURL(/done=resumed$/);
  await tabTo(page, "button", /^Check first$/);
  await page.keyboard.press("Enter");
  await page.getByText("Check of first: valid").waitFor();
  await page.goto("keys");
  for (const [tag, name] of [["input", /^Name$/], ["input", /^API key/], ["input", /^Workspace/], ["button", /^Add the key$/]]) await tabTo(page, tag, name);

  await page.goto("clients");
  await tabTo(page, "summary", /^Token/);
  await page.keyboard.press("Enter");
  await tabTo(page, "select", /previous token/);
  await tabTo(page, "button", /^Make a new token$/);
  await page.keyboard.press("Enter");
  await page.locator("code.secret").waitFor();

  await page.goto("live");
  await tabTo(page, "button", /^Pause$/);
  await page.keyboard.press("Space");
  await page.getByRole("button", { name: "Continue", pressed: true }).waitFor();

  await page.goto("system");
  await tabTo(page, "button", /^Read the configuration again$/);
  await page.keyboard.press("Enter");
  await page.waitForURL(/done=reloaded$/);
  await page.goto("connect");
  await tabTo(page, "button", /^Copy$/);
  await page.goto("");
  await tabTo(page, "summary", /^Show as a table$/);
  await page.keyboard.press("Enter");
  assert.equal(await page.locator("figure.chart details[open]").count(), 1);
  assert.deepEqual(page.problems, []);
});
