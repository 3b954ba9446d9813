"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const made = (tag, text = "", cls = "") => Object.assign(document.createElement(tag), { textContent: text, className: cls });
  const read = (element) => JSON.parse(element ? element.textContent : "null");
  root.classList.add("js");

  // Light and dark. A page from a file may have no storage.
  const theme = document.getElementById("theme");
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.style.colorScheme || (prefersDark.matches ? "dark" : "light")) === "dark";
  const setTheme = (name) => { root.style.colorScheme = name; theme.textContent = isDark() ? "Light" : "Dark"; };
  const stored = (name) => { try { if (name) localStorage.setItem("theme", name); return localStorage.getItem("theme"); } catch { return null; } };
  setTheme(stored() || "");
  prefersDark.addEventListener("change", () => setTheme(root.style.colorScheme));
  theme.addEventListener("click", () => { const name = isDark() ? "light" : "dark"; setTheme(name); stored(name); });

  // The text next to the pointer.
  const tip = document.getElementById("tip");
  const showTip = (text, x, y) => {
    tip.textContent = text; tip.hidden = false;
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${y + 18 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 10 : y + 18}px`;
  };
  const hideTip = () => { tip.hidden = true; };
  const number = (value) => String(Number(value.toPrecision(4)));

  // Values of lines, read off the axes where the pointer is.
  const valuesAt = (svg, x, y) => {
    const place = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM().inverse());
    const [left, top, right, bottom] = svg.dataset.frame.split(" ").map(Number);
    if (place.x < left - 4 || place.x > right + 4 || place.y < top || place.y > bottom + 4) return "";
    const axis = (name, share) => {
      const [low, high, kind] = svg.dataset[name].split(" ");
      return kind === "log" ? low * (high / low) ** share : Number(low) + share * (high - low);
    };
    const lines = all("polyline[data-name]", svg).filter((line) => line.points.length);
    const rows = lines.map((line) => {
      const nearest = [...line.points].reduce((best, one) => Math.abs(one.x - place.x) < Math.abs(best.x - place.x) ? one : best);
      return [line.dataset.name, axis("x", (nearest.x - left) / (right - left)), axis("y", (bottom - nearest.y) / (bottom - top))];
    });
    return rows.map(([name, a, b]) => `${name}: ${number(b)} at ${number(a)}`).join("\n");
  };
  document.addEventListener("pointermove", (event) => {
    const target = event.target instanceof Element ? event.target : null;
    const own = target && target.closest("[data-tip]");
    const svg = target && target.closest("svg.chart");
    const text = own ? own.dataset.tip : svg ? valuesAt(svg, event.clientX, event.clientY) : "";
    if (text) showTip(text, event.clientX, event.clientY); else hideTip();
  });
  const showFocused = () => {
    const own = document.activeElement, box = own.getBoundingClientRect();
    if (own.dataset.tip) showTip(own.dataset.tip, box.left, box.bottom - 12); else hideTip();
  };
  document.addEventListener("focusin", showFocused);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
  document.addEventListener("scroll", showFocused, true);

  // Tables: all rows can be sorted and searched; of many a part is in the document, more as one scrolls.
  const CHUNK = 100;
  const shown = (value, kind) => value === null ? "" : typeof value !== "number" ? value
    : kind === "decimal" ? value.toFixed(3) : value.toLocaleString("en-US");
  const table = (box) => {
    const body = box.querySelector("tbody"), scroll = box.querySelector(".scroll");
    const heads = all("thead th", box);
    const rows = all("tr", body).map((node) => ({
      node, values: [...node.children].map((cell) => cell.dataset.key === undefined ? cell.textContent : Number(cell.dataset.key)),
    }));
    for (const values of read(box.querySelector("script.more")) || []) rows.push({ values });
    const first = rows.filter((row) => row.node).length;
    const build = (row) => {
      if (row.node) return row.node;
      row.node = made("tr");
      row.values.forEach((value, place) => {
        const cell = made(place ? "td" : "th", shown(value, heads[place].dataset.kind), place && typeof value === "number" ? "number" : "");
        if (place) cell.dir = "auto"; else cell.scope = "row";
        row.node.append(cell);
      });
      return row.node;
    };
    let order = rows, count = first;
    const draw = () => {
      body.replaceChildren(...order.slice(0, count).map(build));
      const status = box.querySelector("[data-status]");
      if (status) status.textContent = order.length < rows.length ? `${order.length.toLocaleString("en-US")} of ${rows.length.toLocaleString("en-US")} rows` : "";
    };
    const more = (by) => { if (count < order.length) { count += by; draw(); } };
    scroll.addEventListener("scroll", () => { if (scroll.scrollTop + scroll.clientHeight > scroll.scrollHeight - 400) more(CHUNK); });
    let column = -1, sign = 1, query = "";
    const arrange = () => {
      order = rows.filter((row) => !query || row.values.some((value) => String(value).toLowerCase().includes(query)));
      if (column >= 0) {
        const known = (value) => value !== null && value !== "" && value !== "–";
        order.sort((a, b) => {
          const [x, y] = [a.values[column], b.values[column]];
          if (!known(x) || !known(y)) return known(y) - known(x);
          return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true }));
        });
      }
      count = first;
      draw();
    };
    heads.forEach((head, place) => {
      const button = made("button", head.textContent);
      button.type = "button";
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        // Numbers are looked at from the largest one.
        sign = column === place ? -sign : rows.some((row) => typeof row.values[place] === "number") ? -1 : 1;
        column = place;
        heads.forEach((one) => one.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        arrange();
      });
    });
    const search = box.querySelector("[data-search]");
    if (search) search.addEventListener("input", () => { query = search.value.trim().toLowerCase(); arrange(); });
    return () => more(400);
  };
  const whole = all(".table").map(table);

  // Galleries.
  const images = read(document.getElementById("images")) || {};
  const TILES = 24;
  const galleries = {};
  const gallery = (box) => {
    const data = read(box.querySelector("script.rows"));
    const { columns, separator } = data;
    const name = columns.indexOf("name");
    const tiles = box.querySelector(".tiles");
    const rows = data.rows.map((values) => ({ values }));
    all(".tile", tiles).forEach((node, place) => { rows[place].node = node; });
    const first = tiles.children.length;
    const parts = (row, column) => separator ? String(row.values[column]).split(separator) : [String(row.values[column])];
    const text = (value) => value === null ? "" : typeof value === "number" ? (Number.isInteger(value) ? String(value) : value.toFixed(3)) : value;
    const build = (row) => {
      if (row.node) return row.node;
      const source = images[row.values[name]];
      const image = source ? Object.assign(made("img"), { src: `data:image/jpeg;base64,${source}`, alt: row.values[name] })
        : made("div", "not embedded in this page", "absent");
      const caption = made("figcaption");
      caption.dir = "auto";
      columns.forEach((column, place) => { if (place !== name && text(row.values[place])) caption.append(made("p", `${column}: ${text(row.values[place])}`)); });
      caption.append(made("p", row.values[name]));
      row.node = made("figure", "", "tile");
      row.node.append(image, caption);
      return row.node;
    };
    const selects = all("[data-facet]", box), bounds = all("[data-bound]", box);
    for (const select of selects) {
      const column = columns.indexOf(select.dataset.facet), counts = new Map();
      for (const row of rows) for (const part of parts(row, column)) if (part) counts.set(part, (counts.get(part) || 0) + 1);
      for (const [value, count] of [...counts].sort((a, b) => a[0].localeCompare(b[0], "en", { numeric: true }))) {
        select.append(Object.assign(made("option", `${value} (${count})`), { value }));
      }
    }
    const amount = columns.indexOf(data.amount);
    const more = box.querySelector("[data-more]");
    let order = rows, count = first;
    const draw = () => {
      tiles.replaceChildren(...order.slice(0, count).map(build));
      more.hidden = count >= order.length;
      box.querySelector("[data-status]").textContent = `${Math.min(count, order.length)} of ${order.length.toLocaleString("en-US")} shown`;
    };
    const arrange = () => {
      const [low, high] = bounds.map((input) => input.value === "" ? null : Number(input.value));
      order = rows.filter((row) => selects.every((select) => !select.value || parts(row, columns.indexOf(select.dataset.facet)).includes(select.value))
        && (amount < 0 || ((low == null || row.values[amount] >= low) && (high == null || row.values[amount] <= high))));
      count = Math.max(first, TILES);
      draw();
    };
    for (const input of [...selects, ...bounds]) input.addEventListener("input", arrange);
    more.addEventListener("click", () => { count += TILES; draw(); });
    const choose = (chosen) => {
      for (const select of selects) select.value = chosen[select.dataset.facet] ?? "";
      for (const input of bounds) input.value = "";
      arrange();
    };
    box.querySelector("[data-reset]").addEventListener("click", () => choose({}));
    draw();
    galleries[box.id] = { box, choose };
  };
  all(".gallery").forEach(gallery);

  // A cell of a confusion matrix chooses its images.
  for (const matrix of all("table.matrix[data-gallery]")) {
    const facets = JSON.parse(matrix.dataset.facets);
    const names = all("thead th", matrix).map((head) => head.textContent);
    matrix.addEventListener("click", (event) => {
      const cell = event.target.closest("button") && event.target.closest("td");
      const found = galleries[`g-${matrix.dataset.gallery}`];
      if (!cell || !found) return;
      found.choose({ [facets[0]]: cell.parentElement.children[0].textContent, [facets[1]]: names[cell.cellIndex - 1] });
      found.box.open = true;
      found.box.querySelector("summary").focus({ preventScroll: true });
      found.box.scrollIntoView();
    });
  }

  for (const select of all("[data-highlight]")) {
    select.addEventListener("input", () => {
      const charts = select.closest(".charts");
      for (const other of all("[data-highlight]", charts)) other.value = select.value;
      for (const dot of all("[data-class]", charts)) dot.classList.toggle("dim", select.value !== "" && dot.dataset.class !== select.value);
    });
  }

  // Which section is read.
  const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
  const seen = new Set();
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) seen.add(entry.target.id); else seen.delete(entry.target.id);
    const current = [...links.keys()].find((id) => seen.has(id));
    for (const [id, link] of links) if (id === current) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
  }, { rootMargin: "-10% 0px -60% 0px" });
  for (const id of links.keys()) { const part = document.getElementById(id); if (part) watcher.observe(part); }

  // On paper nothing is folded away.
  addEventListener("beforeprint", () => {
    for (const part of all("details")) part.open = true;
    for (const more of whole) more();
  });
})();
