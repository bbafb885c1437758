/* A table that can be sorted, searched and copied as CSV. */
import type { ComponentChildren } from "preact";
import { useMemo, useState } from "preact/hooks";
import { copyText } from "./files";

export interface TableColumn<Row> {
  name: string;
  title?: string;
  value: (row: Row) => string | number;
  show?: (row: Row) => ComponentChildren;
}

interface Props<Row> {
  label: string;
  columns: TableColumn<Row>[];
  rows: Row[];
  sorted?: { column: number; down: boolean };
  page?: number; // rows shown at first
  onPick?: (row: Row) => void;
  picked?: (row: Row) => boolean;
  onHover?: (row: Row | null) => void;
}

/** A cell of a CSV file. Text that a spreadsheet would take for a formula is quoted by an
    apostrophe (as in export/spreadsheets.py). */
function csvCell(value: string | number): string {
  if (typeof value === "number") return String(value);
  const text = /^[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]/.test(value) && !/^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(value) ? `'${value}` : value;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

export function toCsv<Row>(columns: TableColumn<Row>[], rows: Row[]): string {
  const lines = [columns.map((c) => csvCell(c.name)), ...rows.map((row) => columns.map((c) => csvCell(c.value(row))))];
  return lines.map((cells) => cells.join(",")).join("\n") + "\n";
}

export function Table<Row>(props: Props<Row>) {
  const { columns, rows, label } = props;
  const [order, setOrder] = useState(props.sorted ?? null);
  const [query, setQuery] = useState("");
  const [shown, setShown] = useState(props.page ?? 60);
  const [said, setSaid] = useState("");
  const found = useMemo(() => {
    const wanted = query.trim().toLowerCase();
    const kept = wanted
      ? rows.filter((row) => columns.some((c) => String(c.value(row)).toLowerCase().includes(wanted)))
      : rows.slice();
    if (order) {
      const { value } = columns[order.column]!;
      const sign = order.down ? -1 : 1;
      kept.sort((a, b) => {
        const x = value(a), y = value(b);
        if (typeof x === "number" && typeof y === "number") return sign * (x - y);
        return sign * String(x).localeCompare(String(y), "en");
      });
    }
    return kept;
  }, [rows, columns.length, order, query]);
  const sort = (column: number): void => {
    const numeric = rows.length > 0 && typeof columns[column]!.value(rows[0]!) === "number";
    setOrder(order?.column === column ? { column, down: !order.down } : { column, down: numeric });
  };
  const copy = async (): Promise<void> => {
    const done = await copyText(toCsv(columns, found));
    setSaid(done ? `${found.length} rows copied` : "copying is not allowed here");
    setTimeout(() => setSaid(""), 2500);
  };
  return (
    <section class="table" aria-label={label}>
      <div class="table-bar">
        <h2>{label}</h2>
        <span class="quiet" role="status">{said}</span>
        {rows.length > 5 && (
          <input type="search" placeholder="Search" aria-label={`Search ${label.toLowerCase()}`} value={query}
            onInput={(event) => setQuery(event.currentTarget.value)} />
        )}
        <button type="button" class="small" onClick={copy} disabled={!found.length} aria-label={`Copy ${label.toLowerCase()} as CSV`}>CSV</button>
      </div>
      <div class="table-scroll">
        <table>
          <thead>
            <tr>
              {columns.map((column, i) => (
                <th scope="col" aria-sort={order?.column === i ? (order.down ? "descending" : "ascending") : undefined}>
                  <button type="button" title={column.title} onClick={() => sort(i)}>
                    {column.name}<span class="arrow" aria-hidden="true">{order?.column === i ? (order.down ? "↓" : "↑") : ""}</span>
                  </button>
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {found.slice(0, shown).map((row) => (
              <tr class={props.picked?.(row) ? "picked" : ""}
                onMouseEnter={props.onHover && (() => props.onHover!(row))}
                onMouseLeave={props.onHover && (() => props.onHover!(null))}>
                {columns.map((column, i) => {
                  const content = column.show ? column.show(row) : column.value(row);
                  return (
                    <td>{i === 0 && props.onPick
                      ? <button type="button" class="link" onClick={() => props.onPick!(row)}>{content}</button>
                      : content}</td>
                  );
                })}
              </tr>
            ))}
          </tbody>
        </table>
        {!found.length && <p class="quiet empty">{rows.length ? "Nothing matches." : "No rows."}</p>}
      </div>
      {found.length > shown && (
        <button type="button" class="small more" onClick={() => setShown(shown * 4)}>
          Show more of {found.length.toLocaleString("en")} rows
        </button>
      )}
    </section>
  );
}
