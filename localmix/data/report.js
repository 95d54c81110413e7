"use strict";
(() => {
  const root = document.documentElement;

  const theme = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const nameTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  theme.hidden = false;
  theme.setAttribute("aria-label", "Switch between light and dark");
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  system.addEventListener("change", nameTheme);
  nameTheme();

  // A cell's data-v is its number; cells without one come last whichever way the column is sorted.
  for (const table of document.querySelectorAll("table")) {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const words = head.classList.contains("word");
      const key = (row) => {
        const cell = row.cells[column];
        if (words) return cell.textContent;
        return cell.dataset.v === undefined ? null : Number(cell.dataset.v);
      };
      const compare = (a, b) => words ? a.localeCompare(b, "en", { numeric: true }) : a - b;
      const sorted = [...body.rows].map((row) => [key(row), row]).sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        return down ? compare(b, a) : compare(a, b);
      });
      body.append(...sorted.map(([, row]) => row));
    }));
  }

  const tip = document.getElementById("tip");
  const hide = () => { tip.hidden = true; };
  const show = (mark) => {
    tip.textContent = mark.dataset.lines;
    tip.hidden = false;
    const at = mark.querySelector(".shape").getBoundingClientRect();
    const box = tip.getBoundingClientRect();
    const left = at.left + at.width / 2 - box.width / 2;
    tip.style.left = `${Math.max(8, Math.min(left, root.clientWidth - box.width - 8))}px`;
    tip.style.top = `${at.top - box.height - 10 < 8 ? at.bottom + 10 : at.top - box.height - 10}px`;
  };
  // One tab stop for each chart; arrow keys go from mark to mark.
  for (const chart of document.querySelectorAll("svg.chart")) {
    const marks = [...chart.querySelectorAll(".mark")];
    marks[0].tabIndex = 0;
    marks.forEach((mark, index) => {
      mark.addEventListener("mouseenter", () => show(mark));
      mark.addEventListener("mouseleave", hide);
      mark.addEventListener("focus", () => show(mark));
      mark.addEventListener("blur", hide);
      mark.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (event.key === "Escape") hide();
        if (!step) return;
        event.preventDefault();
        const next = marks[(index + step + marks.length) % marks.length];
        mark.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
      });
    });
  }
  addEventListener("scroll", hide, { passive: true, capture: true });
})();
