"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");

  // --- a box beside the pointer ---------------------------------------------------------------

  function show(x, y, rows) {
    tip.replaceChildren(...rows);
    tip.hidden = false;
    const width = tip.offsetWidth, height = tip.offsetHeight;
    const right = scrollX + document.documentElement.clientWidth, bottom = scrollY + innerHeight;
    tip.style.left = Math.max(scrollX + 4, x + 16 + width > right ? x - 16 - width : x + 16) + "px";
    tip.style.top = Math.max(scrollY + 4, Math.min(y + 12, bottom - height - 8)) + "px";
  }

  function line(text, mark, tag = "div") {
    const row = document.createElement(tag);
    if (mark) {
      const dot = document.createElement("i");
      dot.className = mark;
      row.append(dot);
    }
    row.append(text);
    return row;
  }

  const hide = () => { tip.hidden = true; };
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  /** Where a point of an SVG is on the page. */
  function onPage(svg, x, y) {
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    return [scrollX + box.left + x / view.width * box.width, scrollY + box.top + y / view.height * box.height];
  }

  function inSvg(svg, event) {
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    return [(event.clientX - box.left) / box.width * view.width, (event.clientY - box.top) / box.height * view.height];
  }

  // --- values of a chart ----------------------------------------------------------------------

  const { left, right, top, bottom, width, height } = data.box;
  const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });

  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const chart = data.charts[svg.dataset.chart];
    const steps = [...new Set(chart.lines.flatMap((of) => of.points.map((point) => point[0])))].sort((a, b) => a - b);
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
    cursor.setAttribute("class", "cursor");
    const styles = [...svg.querySelectorAll(".line")].map((each) => each.getAttribute("class").split(" ")[1]);
    let position = -1;

    const at = (index) => {
      position = Math.max(0, Math.min(steps.length - 1, index));
      const step = steps[position];
      const x = left + (step - chart.x[0]) / (chart.x[1] - chart.x[0]) * (width - left - right);
      cursor.setAttribute("d", `M${x} ${top}V${height - bottom}`);
      svg.append(cursor);
      const rows = chart.lines.map((of, n) => {
        const nearest = of.points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
        return line(`${of.name}: ${number.format(nearest[1])}${chart.unit ? " " + chart.unit : ""}`, styles[n]);
      });
      show(...onPage(svg, x, top), [line(`step ${Math.round(step).toLocaleString("en")}`, "", "b"), ...rows]);
    };
    svg.addEventListener("pointermove", (event) => {
      const x = inSvg(svg, event)[0];
      const step = chart.x[0] + (x - left) / (width - left - right) * (chart.x[1] - chart.x[0]);
      at(steps.reduce((best, value, n) => Math.abs(value - step) < Math.abs(steps[best] - step) ? n : best, 0));
    });
    const leave = () => { cursor.remove(); hide(); };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by) { event.preventDefault(); at(position < 0 ? (by > 0 ? 0 : steps.length - 1) : position + by); }
    });
  }

  // --- the filter of the gallery --------------------------------------------------------------

  const filter = document.getElementById("filter");
  if (filter) {
    const group = document.getElementById("filter-group"), text = document.getElementById("filter-text");
    const count = document.getElementById("filter-count");
    const apply = () => {
      const wanted = text.value.trim().toLowerCase();
      let shown = 0, total = 0;
      for (const part of document.querySelectorAll(".group")) {
        const inGroup = !group.value || part.id === group.value;
        let inside = 0;
        for (const card of part.querySelectorAll(".card")) {
          card.hidden = !card.dataset.text.includes(wanted);
          inside += !card.hidden;
          total += 1;
        }
        part.hidden = !inGroup || (wanted !== "" && inside === 0);
        for (const more of part.querySelectorAll("details.more")) more.open = more.open || wanted !== "" || group.value !== "";
        shown += part.hidden ? 0 : inside;
      }
      count.value = `${shown} of ${total} queries`;
    };
    const reset = () => { group.value = ""; text.value = ""; apply(); };
    filter.hidden = false;
    group.addEventListener("change", apply);
    text.addEventListener("input", apply);
    filter.addEventListener("submit", (event) => event.preventDefault());
    // A link to a group that is filtered out shows it again.
    document.addEventListener("click", (event) => {
      const link = event.target.closest("a[href^='#']");
      if (link && document.getElementById(link.hash.slice(1))?.matches(".group[hidden]")) reset();
    });
    apply();
  }

  // --- the map --------------------------------------------------------------------------------

  const plot = document.getElementById("map-plot"), map = data.map;
  if (plot && map) {
    const ring = document.getElementById("map-ring"), chosen = document.getElementById("map-chosen");
    const choice = document.getElementById("map-class");
    let sheets = null, current = -1;
    const order = map.x.map((_, n) => n).sort((a, b) => map.x[a] - map.x[b] || map.y[a] - map.y[b]);

    const picture = (n) => {
      if (map.sheet.side === undefined) return [];
      sheets ??= JSON.parse(document.getElementById("sheets").textContent);
      const { side, columns } = map.sheet, scale = 112 / side, within = n % (columns * columns);
      const shot = document.createElement("div");
      shot.className = "shot";
      shot.style.width = shot.style.height = "112px";
      shot.style.backgroundImage = `url("${sheets[Math.floor(n / (columns * columns))]}")`;
      shot.style.backgroundSize = `${columns * side * scale}px auto`;
      shot.style.backgroundPosition = `${-(within % columns) * 112}px ${-Math.floor(within / columns) * 112}px`;
      return [shot];
    };
    const at = (n) => {
      current = n;
      ring.setAttribute("cx", map.x[n]);
      ring.setAttribute("cy", map.y[n]);
      const state = ["nearest image is of another class", "nearest image is of its class", "no query"][map.state[n]];
      const rows = [line(map.classes[map.label[n]], "", "b"), line(map.names[n]), line(state)];
      show(...onPage(plot, map.x[n], map.y[n]), [...picture(n), ...rows]);
    };
    const leave = () => { ring.setAttribute("cx", -50); hide(); };
    plot.addEventListener("pointermove", (event) => {
      const [x, y] = inSvg(plot, event);
      let best = -1, distance = 18 ** 2;
      for (let n = 0; n < map.x.length; n++) {
        const d = (map.x[n] - x) ** 2 + (map.y[n] - y) ** 2;
        if (d < distance) { best = n; distance = d; }
      }
      if (best < 0) leave(); else at(best);
    });
    plot.addEventListener("pointerleave", leave);
    plot.addEventListener("blur", leave);
    plot.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      const rank = current < 0 ? (by > 0 ? -1 : order.length) : order.indexOf(current);
      at(order[Math.max(0, Math.min(order.length - 1, rank + by))]);
    });
    const names = map.classes.map((name, n) => [name, n]).sort((a, b) => a[0].localeCompare(b[0]));
    choice.append(...names.map(([name, n]) => new Option(name, n)));
    document.getElementById("map-choice").hidden = false;
    choice.addEventListener("change", () => {
      const label = choice.value === "" ? -1 : Number(choice.value);
      chosen.setAttribute("d", map.x.map((x, n) => map.label[n] === label ? `M${x} ${map.y[n]}h0` : "").join(""));
    });
  }
})();
