"use strict";
// A query is {file, name} of a photo of the user's, or {path} of an image of the index. Addresses are relative, so that
// the page also works below a prefix of a proxy.

const $ = (id) => document.getElementById(id);
const TOKEN = "ray-dmml token";
const photos = [];          // of this visit: the browser's history has their numbers
let service = null;         // the answer of GET indexes
let query = null;
let running = null;         // the AbortController of the search that runs
let objectUrls = [];        // of the results on the page

// --- requests ---------------------------------------------------------------------------------

class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

const wait = (ms) => new Promise((done) => setTimeout(done, ms));

async function request(address, options = {}, attempts = 5) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  let answer;
  try {
    answer = await fetch(address, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The service does not answer.");
  }
  const pause = Number(answer.headers.get("Retry-After"));  // without it, the same request would fail again
  if (answer.status === 503 && pause && attempts > 1) {
    await wait(1000 * pause);
    return request(address, options, attempts - 1);
  }
  if (answer.status === 401) askForToken(Boolean(token));
  if (!answer.ok) {
    const body = await answer.json().catch(() => ({}));
    const why = typeof body.detail === "string" ? body.detail : `error ${answer.status}`;
    throw new Refused(answer.status, why.charAt(0).toUpperCase() + why.slice(1) + ".");
  }
  return answer;
}

function askForToken(wasWrong) {
  sessionStorage.removeItem(TOKEN);
  $("main").hidden = true;
  $("login").hidden = false;
  $("token").value = "";
  $("token").placeholder = wasWrong ? "the last one was not accepted" : "";
  $("token").focus();
}

// Pictures cannot be asked for with a token by their address alone.
async function showPicture(image, address) {
  image.addEventListener("error", () => image.replaceWith("no picture"), { once: true });
  if (!sessionStorage.getItem(TOKEN)) {
    image.src = address;
    return;
  }
  try {
    const url = URL.createObjectURL(await (await request(address)).blob());
    objectUrls.push(url);
    image.src = url;
  } catch {
    image.dispatchEvent(new Event("error"));
  }
}

// --- the query --------------------------------------------------------------------------------

function searchFor(next, { isFromHistory = false } = {}) {
  query = next;
  if (!isFromHistory) {
    if (next.file) {
      photos.push(next);
      history.pushState({ photo: photos.length - 1 }, "", location.pathname);
    } else {
      history.pushState({}, "", `#path=${encodeURIComponent(next.path)}`);
    }
  }
  return search();
}

function searchForFile(file) {
  if (!service || !file) return;
  if (file.size > service.max_upload_bytes) {
    say(`${file.name} is too large: at most ${megabytes(service.max_upload_bytes)} MB are read.`, true);
    return;
  }
  searchFor({ file, name: file.name || "pasted image" });
}

function fromAddress() {
  const photo = photos[history.state?.photo];
  const path = new URLSearchParams(location.hash.slice(1)).get("path");
  if (photo) searchFor(photo, { isFromHistory: true });
  else if (path) searchFor({ path }, { isFromHistory: true });
  else clear();
}

function clear() {
  running?.abort();
  query = null;
  $("query").hidden = true;
  $("results").className = "";
  const { name, examples } = service.indexes[0];
  const items = examples.map((image) => element("li", {}, hit(image)));
  $("results").replaceChildren(element("section", { ariaLabel: `Images of ${name}` }, element("ol", {}, ...items)));
  say(items.length ? "Or begin with one of these images." : "");
}

async function search() {
  if (!query) return;
  running?.abort();
  const controller = running = new AbortController();
  const fields = { k: Number($("k").value), filter: $("filter").value, index: chosenIndexes() };
  const options = { method: "POST", signal: controller.signal };
  let address = "search";
  if (query.file) {
    const parameters = new URLSearchParams({ k: fields.k, filter: fields.filter });
    fields.index.forEach((name) => parameters.append("index", name));
    address += `?${parameters}`;
    options.body = query.file;
    options.headers = { "Content-Type": query.file.type || "application/octet-stream" };
    showQuery(query.name, (image) => { image.src = query.url ??= URL.createObjectURL(query.file); });
  } else {
    options.body = JSON.stringify({ ...fields, path: query.path });
    options.headers = { "Content-Type": "application/json" };
  }
  say("Searching …");
  $("results").classList.add("waiting");
  try {
    const { results } = await (await request(address, options)).json();
    if (controller !== running) return;
    show(results);
  } catch (error) {
    if (error.name === "AbortError" || controller !== running) return;
    $("results").replaceChildren();
    say(error.message, true);
  } finally {
    if (controller === running) $("results").classList.remove("waiting");
  }
}

function chosenIndexes() {
  const boxes = [...$("compare").querySelectorAll("input")];
  return boxes.filter((box) => box.checked).map((box) => box.value);
}

// --- the page ---------------------------------------------------------------------------------

function say(text, isBad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", isBad);
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  Object.assign(made, attributes);
  made.append(...children);
  return made;
}

function showQuery(name, fill) {
  const image = element("img", { id: "query-picture", alt: `Query: ${name}` });
  image.addEventListener("error", () => { image.hidden = true; }, { once: true });  // a format that the browser lacks
  $("query-picture").replaceWith(image);
  fill(image);
  $("query-name").textContent = name;
  $("query").hidden = false;
  if (!matchMedia("(pointer: coarse)").matches) $("hint").textContent = "Drop or paste another photo, or click an image below";
}

function show(results) {
  objectUrls.forEach(URL.revokeObjectURL);
  objectUrls = [];
  const own = results[0].query;
  if (own) showQuery(own.path, (image) => showPicture(image, own.picture));
  const found = results.map((result) => new Set(result.matches.map((match) => match.path)));
  const sections = results.map((result, number) => {
    const others = found.filter((_, other) => other !== number);
    const items = result.matches.map((match) => {
      const isOnlyHere = others.length > 0 && !others.some((paths) => paths.has(match.path));
      return element("li", {}, hit(match, isOnlyHere));
    });
    const parts = items.length ? [element("ol", {}, ...items)] : [element("p", {}, "Nothing was found.")];
    if (results.length > 1) parts.unshift(element("h2", {}, result.index));
    return element("section", { ariaLabel: `Found by ${result.index}` }, ...parts);
  });
  $("results").replaceChildren(...sections);
  $("results").className = results.length > 1 ? "compared" : "";
  const counts = results.map((result) => result.matches.length);
  const filter = $("filter").value;
  const where = filter ? ` among the paths that begin with ${filter}` : "";
  say(Math.max(...counts) ? `The ${Math.max(...counts)} most similar images${where}. A similarity of 1 is the same embedding.`
    : `No image was found${where}.`);
}

// An image of the index that starts a search. Results also have a similarity.
function hit(match, isOnlyHere = false) {
  const image = element("img", { alt: match.path, loading: "lazy", decoding: "async" });
  const button = element("button", { type: "button", className: "hit", title: match.path }, element("span", { className: "frame" }, image));
  let label = `Search for ${match.path}`;
  if (match.similarity !== undefined) {
    const similarity = match.similarity.toFixed(3);
    button.append(element("b", {}, similarity));
    label += `, rank ${match.rank}, similarity ${similarity}`;
  }
  if (isOnlyHere) {
    button.append(element("span", { className: "only" }, "only here"));
    label += ", not in the other results";
  }
  const cut = match.path.lastIndexOf("/") + 1;
  button.append(element("span", { className: "path" },
    element("span", {}, match.path.slice(0, cut)), element("span", {}, match.path.slice(cut))));
  button.setAttribute("aria-label", label);
  button.addEventListener("click", () => {
    searchFor({ path: match.path });
    scrollTo({ top: 0, behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  });
  showPicture(image, match.picture);
  return button;
}

const megabytes = (bytes) => (bytes / 1e6).toLocaleString(undefined, { maximumFractionDigits: 1 });

function describe() {
  const [first, ...others] = service.indexes;
  const what = others.length ? [first, ...others].map((index) => index.name).join(", ") : `${first.name}, ${first.dimensions} dimensions`;
  $("about").textContent = `${first.num_images.toLocaleString()} images · ${what}`;
  $("folders").replaceChildren(...first.folders.map((value) => element("option", { value })));
  const boxes = service.indexes.map((index, number) => element("label", {},
    element("input", { type: "checkbox", value: index.name, checked: number < 3, onchange: search }), index.name));
  $("compare").replaceChildren($("compare").querySelector("legend"), ...boxes);
  $("compare").hidden = service.indexes.length < 2;
}

async function start() {
  try {
    service = await (await request("indexes")).json();
  } catch (error) {
    if (error.status !== 401) { $("main").hidden = false; say(error.message, true); }
    return;
  }
  $("login").hidden = true;
  $("main").hidden = false;
  describe();
  if (matchMedia("(pointer: coarse)").matches) $("hint").textContent = "Take a photo, or choose one";
  fromAddress();
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, $("token").value);
  start();
});
$("file").addEventListener("change", () => { searchForFile($("file").files[0]); $("file").value = ""; });
$("k").addEventListener("change", search);
$("filter").addEventListener("change", search);
addEventListener("popstate", () => { if (service) fromAddress(); });
addEventListener("hashchange", () => { if (service && new URLSearchParams(location.hash.slice(1)).get("path") !== query?.path) fromAddress(); });
addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files][0];
  if (service && file) { event.preventDefault(); searchForFile(file); }
});
addEventListener("dragover", (event) => {
  if (![...event.dataTransfer.types].includes("Files")) return;
  event.preventDefault();
  $("drop").classList.add("over");
});
addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").classList.remove("over"); });
addEventListener("drop", (event) => {
  $("drop").classList.remove("over");
  const file = event.dataTransfer.files[0];
  if (!service || !file) return;
  event.preventDefault();
  searchForFile(file);
});

start();
