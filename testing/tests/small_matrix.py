"""A matrix of a few cells, for tests."""

from pathlib import Path

from testing.matrix.cells import Matrix, load_matrix

TEXT = """\
speed_rule: {allowed_loss: 0.02, most_noise: 0.01}
accuracy:
  bf16:
    o: {whole: 1.0e-2, worst_block: 2.0e-2}
    dx: {whole: 1.0e-2, worst_block: 2.0e-2}
    dw_up: {whole: 1.0e-2, worst_block: 2.0e-2}
    dw_down: {whole: 1.0e-2, worst_block: 2.0e-2}
    db_up: {whole: 1.0e-2, worst_block: 2.0e-2}
    db_down: {whole: 1.0e-2, worst_block: 2.0e-2}
    drouter: {whole: 1.0e-2, worst_block: 2.0e-2}
profiles:
  cpu:
    limits: {routed_rows: 512, weight_elements: 1000000, min_intermediate: 32, tile_m: 16}
    repeats: 2
    memory_gib: 4
    cell_timeout_s: 60
  hopper:
    limits: {routed_rows: null, weight_elements: 1000000000, min_intermediate: null, tile_m: null}
    repeats: 2
    memory_gib: 4
    cell_timeout_s: 60
routings:
  softmax: {method: top_k, scoring: softmax}
  grouped: {method: top_k, scoring: sigmoid, num_groups: 4, groups_per_token: 2}
  nearest: {method: token_rounding, mode: nearest, tile_m: 128}
layers:
  - group: layer
    about: Layers.
    common: {routing: softmax}
    cells:
      - {name: one, thiek: [1024, 768, 256, 8, 2]}
      - {name: two, thiek: [1024, 768, 256, 8, 2], bias: true}
routing:
  - group: route
    about: Routing.
    cells:
      - {name: rounded, tokens: 1024, experts: 8, per_token: 2, routing: nearest}
count_cumsum:
  - group: count
    about: Counts.
    cells:
      - {name: e4, experts: 4, lengths: [0, 10]}
speed:
  - group: speed
    about: Speed.
    cells:
      - {name: fast, thiek: [1024, 768, 256, 8, 2], routing: softmax, modes: [forward]}
floors:
"""


def write(folder: Path, *replacements: tuple[str, str]) -> Path:
    """Write the matrix with some text replaced; each replaced text must be there."""
    text = TEXT
    for old, new in replacements:
        if old not in text:
            raise ValueError(f"{old!r} is not in the small matrix")
        text = text.replace(old, new)
    path = folder / "matrix.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path) -> Matrix:
    return load_matrix(write(folder))
