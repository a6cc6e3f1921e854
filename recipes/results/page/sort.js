// A click on the head of a column sorts its table: numbers by data-value, absent ones last, then the other way round.
"use strict";
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const table = head.closest("table");
    const body = table.tBodies[0];
    const rising = head.getAttribute("aria-sort") !== "ascending";
    const text = (row) => row.cells[head.cellIndex].textContent.trim();
    const number = (row) => {
      const value = row.cells[head.cellIndex].dataset.value;
      return value === undefined || value === "" ? NaN : Number(value);
    };
    const rows = [...body.rows];
    const numeric = rows.some((row) => !Number.isNaN(number(row)));
    rows.sort((a, b) => {
      if (!numeric) return (rising ? 1 : -1) * text(a).localeCompare(text(b));
      const x = number(a);
      const y = number(b);
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return rising ? x - y : y - x;
    });
    for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    body.append(...rows);
  });
}
