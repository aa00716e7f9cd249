// Draws the figures of the page and makes them highlight the selected device.
(() => {
  const ERRORS = 1; // log level of Vega: errors only, no warnings
  const { config, specs } = JSON.parse(document.getElementById("figures").textContent);
  const views = new Map(); // by name of the figure
  let device = null;

  async function draw(place) {
    const name = place.dataset.figure;
    if (views.has(name)) return;
    views.set(name, null);
    const options = { config, renderer: "svg", actions: false, ast: true, logLevel: ERRORS, tooltip: { theme: "custom" } };
    const { view } = await vegaEmbed(place, specs[name], options);
    views.set(name, view);
    view.addEventListener("click", (event, item) => {
      const clicked = item && item.datum && item.datum.device;
      if (Number.isInteger(clicked)) pick(clicked === device ? null : clicked);
    });
    if (device !== null) await follow(name, view);
  }

  function follow(name, view) {
    const follows = (specs[name].params || []).some((each) => each.name === "device");
    return view && follows ? view.signal("device", device).runAsync() : null;
  }

  const picker = document.getElementById("device");

  async function pick(wanted) {
    if (!picker) return;
    device = wanted;
    picker.value = device === null ? "" : String(device);
    for (const row of document.querySelectorAll("tr[data-device]")) {
      const chosen = device !== null && Number(row.dataset.device) === device;
      row.setAttribute("aria-selected", chosen);
      row.querySelector("button").setAttribute("aria-pressed", chosen);
    }
    await Promise.all([...views].map(([name, view]) => follow(name, view)));
    document.documentElement.dataset.device = picker.value; // when all figures have followed
  }

  if (picker) picker.addEventListener("change", () => pick(picker.value === "" ? null : Number(picker.value)));
  for (const row of document.querySelectorAll("tr[data-device]")) {
    row.addEventListener("click", () => pick(Number(row.dataset.device) === device ? null : Number(row.dataset.device)));
  }

  for (const select of document.querySelectorAll("select[data-choice]")) {
    select.addEventListener("change", () => {
      for (const option of select.closest("figure").querySelectorAll("[data-option]")) {
        option.hidden = option.dataset.option !== select.value;
        if (!option.hidden) option.querySelectorAll(".drawing").forEach(draw);
      }
    });
  }

  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const shown = root.dataset.theme || (dark ? "dark" : "light");
    root.dataset.theme = shown === "dark" ? "light" : "dark";
  });

  const shown = [...document.querySelectorAll(".drawing")].filter((place) => !place.closest("[hidden]"));
  Promise.all(shown.map(draw)).then(() => (document.documentElement.dataset.drawn = String(shown.length)));
})();
