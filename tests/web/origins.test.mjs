// Tests that web pages of other origins and requests with an unknown host name cannot use the dashboard, and that the
// dashboard works below a path prefix and at an address for operators.

import assert from "node:assert/strict";
import { createServer, request as httpRequest } from "node:http";
import { test } from "node:test";
import { openPage, signIn } from "./browser.mjs";
import { SPARE_KEY, startDashboard } from "./dashboard.mjs";

/** Starts an HTTP server on a free port of the loopback address. Resolves with its port. */
async function listen(context, respond) {
  const server = createServer(respond);
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  context.after(() => new Promise((resolve) => (server.close(resolve), server.closeAllConnections())));
  return server.address().port;
}

test("a page on another port can neither post nor frame the dashboard", async (t) => {
  const dashboard = await startDashboard(t);
  const { id } = await dashboard.key("first");
  const target = `${dashboard.url}/_/keys`;
  const port = await listen(t, (_, response) => {
    response.setHeader("content-type", "text/html");
    response.end(`<form method="post" action="${target}"><input name="id" value="${id}"><button name="action" value="pause">Win</button></form>`);
  });
  const context = await signIn(dashboard);
  t.after(() => context.close());
  const keys = await dashboard.keys();
  // `127.0.0.1` is the same site as the dashboard, and `localhost` is another site on the same machine.
  for (const host of ["127.0.0.1", "localhost"]) {
    const page = await openPage(context);
    await page.goto(`http://${host}:${port}/`);
    const outcomes = await page.evaluate(async ({ target, id, key }) => {
      const post = (options) => fetch(target, { method: "POST", credentials: "include", ...options }).then((response) => response.type, () => "refused");
      const form = new URLSearchParams({ id, action: "pause" });
      return [
        await post({ body: form, mode: "no-cors" }), await post({ body: form }),
        await post({ body: new URLSearchParams({ action: "add", name: "evil", key }), mode: "no-cors" }),
        await fetch(target, { credentials: "include" }).then(() => "read", () => "refused"),
      ];
    }, { target, id, key: SPARE_KEY });
    assert.deepEqual(outcomes.filter((outcome) => ["basic", "cors", "read"].includes(outcome)), [], `no response may be readable: ${outcomes.join()}`);
    const [response] = await Promise.all([page.waitForResponse(target), page.getByRole("button", { name: "Win" }).click()]);
    assert.equal(response.status(), 403);

    await page.goto(`http://${host}:${port}/`);
    await page.evaluate((url) => {
      const frame = document.createElement("iframe");
      frame.src = url;
      document.body.append(frame);
      return new Promise((resolve) => (frame.onload = frame.onerror = resolve));
    }, `${dashboard.url}/_/`);
    const framed = page.frames().find((frame) => frame !== page.mainFrame());
    assert.ok(!framed || !(await framed.content()).includes("Can requests be served?"), "the frame must not contain the dashboard");
    assert.ok(page.problems.some((problem) => /frame-ancestors|refused to connect|ERR_BLOCKED_BY_RESPONSE|403/i.test(problem)), `the browser must report the refused frame: ${page.problems.join("\n")}`);
    await page.close();
  }
  assert.deepEqual(await dashboard.keys(), keys);
  assert.deepEqual(await dashboard.changes(), []);
});

test("a link on a page of another site does not open a page of the dashboard", async (t) => {
  const dashboard = await startDashboard(t);
  const port = await listen(t, (_, response) => {
    response.setHeader("content-type", "text/html");
    response.end(`<a href="${dashboard.url}/_/keys">keys</a>`);
  });
  const context = await signIn(dashboard);
  t.after(() => context.close());
  const page = await openPage(context);
  await page.goto(`http://localhost:${port}/`);
  const [response] = await Promise.all([page.waitForResponse(`${dashboard.url}/_/keys`), page.getByRole("link").click()]);
  assert.equal(response.status(), 403);
  assert.ok(!(await response.request().allHeaders()).cookie, "the request must not contain the cookie");
});

test("the dashboard is served below a prefix", async (t) => {
  const dashboard = await startDashboard(t, { settings: { KEYCHOIR_SERVER__BASE_PATH: "/eleven" } });
  const { hostname, port } = new URL(dashboard.url);
  const requestedPaths = new Set();
  // An outer proxy that forwards the paths below the prefix unchanged, and responds to other paths with 404.
  const outerPort = await listen(t, (incoming, response) => {
    requestedPaths.add(incoming.url);
    if (!incoming.url.startsWith("/eleven/")) return response.writeHead(404).end();
    const forwarded = httpRequest({ hostname, port, path: incoming.url, method: incoming.method, headers: incoming.headers }, (reply) => {
      response.writeHead(reply.statusCode, reply.headers);
      reply.pipe(response);
    });
    response.on("close", () => forwarded.destroy());
    incoming.pipe(forwarded.on("error", () => response.destroy()));
  });
  const baseUrl = `http://127.0.0.1:${outerPort}/eleven`;
  const context = await signIn(dashboard, { baseURL: `${baseUrl}/_/` }, baseUrl);
  t.after(() => context.close());
  const page = await openPage(context);
  await page.goto(`${baseUrl}/_`);
  assert.equal(page.url(), `${baseUrl}/_/`);
  const links = new Set();
  for (const path of ["", "keys", "live", "usage", "clients", "connect", "system", `key?id=${(await dashboard.key("first")).id}`]) {
    await page.goto(path);
    for (const link of await page.locator("a[href]").evaluateAll((anchors) => anchors.map((anchor) => anchor.href))) links.add(link);
    const actions = await page.locator("form").evaluateAll((forms) => forms.map((form) => new URL(form.getAttribute("action"), document.baseURI).href));
    assert.ok(actions.every((action) => action.startsWith(`${baseUrl}/_/`)), `each form must be below the prefix: ${actions.join()}`);
  }
  for (const link of [...links].filter((link) => !link.includes("#"))) {
    assert.ok(link.startsWith(`${baseUrl}/_/`), `the link ${link} must be below the prefix`);
    assert.equal((await context.request.get(link)).status(), 200, `the link ${link} must lead to a page`);
  }
  await page.goto("connect");
  assert.match(await page.locator("main").innerText(), new RegExp(`base_url="${baseUrl}"`));
  await page.goto("keys");
  await page.getByRole("button", { name: "Pause first" }).click();
  await page.waitForURL(`${baseUrl}/_/keys?done=paused`);
  assert.equal((await dashboard.key("first")).state, "paused");
  await page.getByRole("button", { name: "Sign out" }).click();
  await page.waitForURL(`${baseUrl}/_/login`);
  assert.deepEqual(page.problems, []);
  assert.deepEqual([...requestedPaths].filter((path) => !path.startsWith("/eleven/_")), []);
});

test("if there is an address for operators, only it serves the dashboard", async (t) => {
  const dashboard = await startDashboard(t, { settings: { KEYCHOIR_ADMIN__LISTEN: "localhost:0" } });
  assert.notEqual(dashboard.url, dashboard.adminUrl);
  for (const path of ["", "login", "keys", "events", "assets/app.js"]) assert.equal((await fetch(`${dashboard.url}/_/${path}`, { redirect: "manual" })).status, 404, `the address for clients must not serve /_/${path}`);
  const context = await signIn(dashboard, { baseURL: `${dashboard.adminUrl}/_/` });
  t.after(() => context.close());
  const page = await openPage(context);
  await page.goto("connect");
  assert.match(await page.locator("main").innerText(), /base_url="http:\/\/127\.0\.0\.1:\d+"/);
  assert.deepEqual(page.problems, []);
});

test("a request with an unknown host name is refused", async (t) => {
  const dashboard = await startDashboard(t);
  const { port } = new URL(dashboard.url);
  // An attacker can make its own host name resolve to this machine.
  const status = await new Promise((resolve, reject) => {
    httpRequest({ host: "127.0.0.1", port, path: "/_/login", headers: { host: `attacker.example:${port}` } }, (response) => resolve(response.resume().statusCode)).on("error", reject).end();
  });
  assert.equal(status, 421);
});
