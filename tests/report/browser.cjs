// Pages in headless Chromium, at each width and in each theme: what axe-core, the console and the layout complain of, as JSON.
//
//   node browser.cjs CHROMIUM FOLDER-OF-PICTURES-OR-"" PAGE.html ...
//
// playwright-core and axe-core are found as `require` finds modules: in node_modules above, or through NODE_PATH.
const { chromium } = require("playwright-core");
const path = require("node:path");
const { pathToFileURL } = require("node:url");
const axe = require("axe-core").source;

const WIDTHS = [1440, 390];
const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
FLAGS.push("--disable-component-update", "--disable-sync");

async function complaints(browser, file, width, colorScheme, pictures) {
  const context = await browser.newContext({ viewport: { width, height: 900 }, colorScheme });
  const page = await context.newPage(), address = pathToFileURL(path.resolve(file)).href, found = [];
  page.on("console", (message) => found.push(`console ${message.type()}: ${message.text()}`));
  page.on("pageerror", (error) => found.push(`error: ${error.message}`));
  page.on("request", (request) => request.url() === address || found.push(`request: ${request.url()}`));
  await page.goto(address);
  const wider = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  if (wider > 0) found.push(`the page is ${wider} pixels wider than the screen`);
  if (pictures) {
    const name = `${path.basename(file, ".html")}-${width}-${colorScheme}.png`;
    await page.screenshot({ path: path.join(pictures, name), fullPage: true });
  }
  await page.evaluate(axe);
  const { violations, passes } = await page.evaluate(() => window.axe.run());
  for (const { id, help, nodes } of violations)
    for (const { target, failureSummary } of nodes) found.push(`axe ${id}: ${help}: ${target}: ${failureSummary}`);
  const table = await page.$("#layers");
  const behaviour = table ? await page.evaluate(useTable) : null;
  await context.close();
  return { page: path.basename(file), width, theme: colorScheme, found, passed: passes.length, behaviour };
}

// press the heading of the error twice, then search: the order and the rows that are left
function useTable() {
  const button = [...document.querySelectorAll("#layers thead button")].find((b) => b.textContent === "Error");
  const column = button.parentElement.cellIndex, rows = () => [...document.querySelectorAll("#layers tbody tr:not([hidden])")];
  const values = () => rows().map((row) => row.cells[column].dataset.value).map((v) => (v === "" ? null : Number(v)));
  button.click();
  const up = values();
  button.click();
  const down = values(), search = document.getElementById("search");
  search.value = "layers.1. Q_PROJ";
  search.dispatchEvent(new Event("input"));
  return { up, down, names: rows().map((row) => row.cells[0].textContent), count: document.getElementById("count").textContent };
}

(async () => {
  const [executablePath, pictures, ...files] = process.argv.slice(2);
  const browser = await chromium.launch({ executablePath, args: FLAGS });
  const results = [];
  for (const file of files)
    for (const width of WIDTHS)
      for (const theme of ["light", "dark"]) results.push(await complaints(browser, file, width, theme, pictures));
  await browser.close();
  process.stdout.write(JSON.stringify(results));
})().catch((error) => {
  process.stderr.write(`${error.stack}\n`);
  process.exit(1);
});
