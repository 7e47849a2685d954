//! Errors to plant in `columns.cuh`: a line, and what becomes of it.

pub const COLUMNS: &[(&str, &str)] = &[
    ("    __syncthreads();", "    __syncwarp();"),
    ("row += WARPS) add(", "row += WARPS + 1) add("),
    ("part * ROWS_OF_BLOCK + warp; row", "part * ROWS_OF_BLOCK; row"),
    ("if (mine < WIDTH && first + mine < columns) {", "if (mine < WIDTH) {"),
    ("for (int i = 0; i < WARPS; i++) sum", "for (int i = 1; i < WARPS; i++) sum"),
    ("if (column < columns) {", "if (column <= columns) {"),
    ("rows < (part + 1) * ROWS_OF_BLOCK ? rows", "rows < part * ROWS_OF_BLOCK ? rows"),
    ("shared + warp * WIDTH + lane", "shared + lane"),
    ("partials[part * columns + first + mine]", "partials[first + mine]"),
];
