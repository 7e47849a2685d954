//! Errors to plant in `rms_norm.cu`: a line, and what becomes of it.

pub const RMS_NORM: &[(&str, &str)] = &[
    ("/ float(columns) + args.eps);", "/ float(columns));"),
    ("rstd * rstd * rstd *", "rstd * rstd *"),
    ("from_f32<T>(to_f32(out.v[j]) + step)", "from_f32<T>(step)"),
    ("- to_f32(values[i].v[j]) * c;", "+ to_f32(values[i].v[j]) * c;"),
    ("if (threadIdx.x == 0) args.rstd[row] = rstd;", "args.rstd[row] = rstd;"),
    ("squares += to_f32(values[i].v[j]) * to_f32(values[i].v[j]);", "squares += to_f32(values[i].v[0]) * to_f32(values[i].v[j]);"),
    ("to_f32(dy.v[j]) * (to_f32(x.v[j]) * rstd)", "to_f32(dy.v[j]) * to_f32(x.v[j])"),
    ("dot += to_f32(values[i].v[j]) * (to_f32(w.v[j]) * to_f32(grads[i].v[j]));", "dot += to_f32(values[i].v[j]) * to_f32(grads[i].v[j]);"),
    ("to_f32(w.v[j]) * (to_f32(values[i].v[j]) * rstd)", "to_f32(values[i].v[j]) * rstd"),
    ("constexpr int LOADS = 8;", "constexpr int LOADS = 1;"),
];
