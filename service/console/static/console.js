// Sliders show summaries from the rows of their table; without this script, the table remains.
"use strict";
for (const slider of document.querySelectorAll("input[data-table]")) {
  const rows = [...document.getElementById(slider.dataset.table).tBodies[0].rows];
  const output = document.getElementById(slider.dataset.summary);
  const section = slider.closest("section");
  const show = () => {
    const chosen = rows[slider.value];
    rows.forEach((row) => row.classList.toggle("chosen", row === chosen));
    output.textContent = chosen.dataset.summary;
    slider.setAttribute("aria-valuetext", chosen.cells[0].textContent);
    const tenth = Number(chosen.dataset.tenth);
    for (const line of section.querySelectorAll(".what-if")) {
      const x = `${line.dataset.step * tenth}%`;
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
    }
    for (const bar of section.querySelectorAll("rect[data-tenth]")) {
      const flagged = Number(bar.dataset.tenth) >= tenth;
      bar.setAttribute("class", flagged ? "flagged" : "passed");
    }
  };
  if (rows.length) {
    slider.parentElement.hidden = false;
    slider.addEventListener("input", show);
    show();
  }
}
