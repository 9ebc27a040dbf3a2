// Starts the installed Chromium, and opens pages that record their errors.

import assert from "node:assert/strict";
import { accessSync, constants } from "node:fs";
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { delimiter, join } from "node:path";
import { after } from "node:test";
import { chromium } from "playwright-core";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

function find(program) {
  const isExecutable = (path) => {
    try {
      return accessSync(path, constants.X_OK), true;
    } catch {
      return false;
    }
  };
  const path = process.env.PATH.split(delimiter).map((directory) => join(directory, program)).find(isExecutable);
  assert.ok(path, `the tests need ${program} in the PATH: apt-get install ${program}`);
  return path;
}

/** The browser of this file. The tests may run as root, for whom Chromium has no sandbox. */
export const browser = await chromium.launch({ executablePath: find("chromium"), args: ["--no-sandbox"] });
after(() => browser.close());

/** Opens a page that records errors of its console and violations of its policy in `page.problems`. */
export async function openPage(context) {
  const page = await context.newPage();
  page.problems = [];
  page.on("console", (message) => message.type() === "error" && page.problems.push(`${message.text()} (${message.location().url})`));
  page.on("pageerror", (error) => page.problems.push(error.message));
  await page.addInitScript(() => {
    addEventListener("securitypolicyviolation", (event) => console.error(`policy: ${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
  });
  return page;
}

/** Opens a browser context that is signed in. */
export async function signIn(dashboard, options = {}, base = dashboard.adminUrl) {
  const context = await browser.newContext(options);
  const page = await context.newPage();
  const code = new URL(await dashboard.link()).hash;
  await page.goto(`${base}/_/login${code}`);
  await page.waitForURL(`${base}/_/`);
  await page.close();
  return context;
}

/** Returns the rules that a page violates, with the elements. */
export async function auditAccessibility(page) {
  await page.evaluate(AXE);
  const { violations } = await page.evaluate(() => axe.run());
  return violations.map(({ id, nodes }) => `${id}: ${nodes.map((node) => `${node.html.slice(0, 200)} ${node.failureSummary}`).join("; ")}`);
}
