"""One table of results in the form of the paper's Table 1: Markdown, JSON, or the terminal."""

import json
import math
from dataclasses import asdict, dataclass, field

import rich.box
import rich.console
import rich.table
from rich.cells import cell_len
from rich.text import Text

MISSING = "–"


@dataclass
class Row:
    """One model. `params` is a count, `resolution` a side or (height, width) in pixels, `throughput` images/s, and
    `metrics` column -> value. None means not measured.

    `speeds` has the images/s of those metrics that were measured at another resolution than `throughput`: at theirs.
    """

    model: str
    params: int | None = None
    resolution: int | tuple[int, int] | None = None
    throughput: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    speeds: dict[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in {"Throughput": self.throughput, **self.metrics}.items():
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} of {self.model!r} is {value}; expected a number, or None if not measured.")


@dataclass
class Table:
    """Rows with their title and notes. The best value of a column is bold if there is another to compare it with;
    larger is better except in the columns named in `lower_is_better`. Metrics are percentages unless `units` says
    otherwise."""

    title: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    lower_is_better: list[str] = field(default_factory=list)
    units: dict[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        metrics = dict.fromkeys(name for row in self.rows for name in row.metrics)  # unique, in order of appearance
        return ["Model", "Params (M)", "Resolution", "Throughput", *metrics]

    def cells(self) -> list[list[tuple[str, bool]]]:
        """Per row and column: the text, and whether it is the column's best."""
        described = [[(row.model, False), (_params(row), False), (_resolution(row), False)] for row in self.rows]
        for column in self.columns[3:]:
            values = [row.throughput if column == "Throughput" else row.metrics.get(column) for row in self.rows]
            texts = [_number(value, column == "Throughput") for value in values]
            known = [value for value in values if value is not None]
            best = None
            if len(known) > 1:
                best = texts[values.index(min(known) if column in self.lower_is_better else max(known))]
            for cells, text in zip(described, texts, strict=True):
                cells.append((text, text == best))  # by text: what prints alike is bold alike
        return described

    def to_markdown(self) -> str:
        lines = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1)]
        lines += [[f"**{_escape(text)}**" if best else _escape(text) for text, best in row] for row in self.cells()]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        notes = "\n".join(f"- {note}" for note in self.notes)
        return "\n\n".join(part for part in (f"### {self.title}", table, notes) if part) + "\n"

    def to_json(self) -> str:
        """Every value at full precision: title, rows (the fields of `Row`), notes, lower_is_better."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Table":
        """The table that `to_json` wrote."""
        fields = json.loads(text)
        for row in fields["rows"]:
            if isinstance(row["resolution"], list):  # JSON has no tuples
                row["resolution"] = tuple(row["resolution"])
        fields["rows"] = [Row(**row) for row in fields["rows"]]
        return cls(**fields)

    def to_rich(self, width: int = 80) -> rich.console.Group:
        """For `rich.console.Console().print`, at most `width` characters wide.

        Headings wrap between their words; columns without room follow below, in further tables with the models again.
        """
        cells = self.cells()
        columns = [[name, *(row[number][0] for row in cells)] for number, name in enumerate(self.columns)]
        widths = [max(map(cell_len, one)) for one in columns]
        if _total(widths, [*range(len(widths))]) > width:
            widths = [min(width // 3, max(cell_len(word) for text in one for word in text.split())) for one in columns]
            widths[0] = min(widths[0], width // 5)  # the models' names fold before there is a second table
        parts: list[list[int]] = [[]]  # the columns of each table, besides the models'
        for number in range(1, len(columns)):
            if _total(widths, [0, *parts[-1], number]) > width and parts[-1]:
                parts.append([])
            parts[-1].append(number)
        shown: list[rich.table.Table | Text] = []
        for part in parts:
            table = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
            room = width - _total(widths, [0, *part]) + widths[0]
            models = max(widths[0], min(room, max(map(cell_len, columns[0]))))
            table.add_column(Text(self.columns[0]), width=models, overflow="fold")
            for number in part:
                table.add_column(Text(self.columns[number]), justify="right", width=widths[number], overflow="fold")
            for row in cells:
                table.add_row(*(Text(row[n][0], style="bold green" if row[n][1] else "") for n in (0, *part)))
            shown += [table, Text()]
        assert isinstance(shown[0], rich.table.Table)
        shown[0].title = Text(self.title)
        return rich.console.Group(*shown, Text("\n".join(self.notes)))


def _total(widths: list[int], columns: list[int]) -> int:
    """The width of a table of these columns: two spaces between them."""
    return sum(widths[number] for number in columns) + 2 * (len(columns) - 1)


def _params(row: Row) -> str:
    return MISSING if row.params is None else f"{row.params / 1e6:.{0 if row.params >= 1e8 else 1}f}"


def _resolution(row: Row) -> str:
    if row.resolution is None:
        return MISSING
    return str(row.resolution) if isinstance(row.resolution, int) else "×".join(map(str, row.resolution))


def _number(value: float | None, is_throughput: bool) -> str:
    if value is None:
        return MISSING
    return f"{value:.{0 if value >= 100 else 1}f}" if is_throughput else f"{value:.2f}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
