// Starts the installed Chromium for a test file, opens pages that record their errors, signs in to the dashboard, and
// audits the accessibility of pages.

import assert from "node:assert/strict";
import { accessSync, constants, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { delimiter, join } from "node:path";
import { after } from "node:test";
import { chromium } from "playwright-core";

const AXE_SCRIPT = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

/** Returns the path of an installed program. */
function findProgram(program) {
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

/** The browser of the test file. The tests may run as root, and Chromium refuses to use its sandbox as root. */
export const browser = await chromium.launch({ executablePath: findProgram("chromium"), args: ["--no-sandbox"] });
after(() => browser.close());

/**
 * Opens a page that records in `page.problems` the errors of its scripts, the errors in its console, and the violations
 * of its content security policy.
 */
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

/** Opens a browser context with these options, and signs it in to the dashboard at `baseUrl`. */
export async function signIn(dashboard, options = {}, baseUrl = dashboard.adminUrl) {
  const context = await browser.newContext(options);
  const page = await context.newPage();
  const code = new URL(await dashboard.createLink()).hash;
  await page.goto(`${baseUrl}/_/login${code}`);
  await page.waitForURL(`${baseUrl}/_/`);
  await page.close();
  return context;
}

/** Returns descriptions of the accessibility rules that a page violates, with the elements that violate them. */
export async function auditAccessibility(page) {
  await page.evaluate(AXE_SCRIPT);
  const { violations } = await page.evaluate(() => axe.run());
  return violations.map(({ id, nodes }) => `${id}: ${nodes.map((node) => `${node.html.slice(0, 200)} ${node.failureSummary}`).join("; ")}`);
}
