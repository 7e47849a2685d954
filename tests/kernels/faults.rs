//! What the shim must find, and that it finds nothing where nothing is.

use std::path::Path;

use bytemuck::NoUninit;
use glmddp::kernels::check::Case;
use glmddp::kernels::launch::{Launch, launch};

use crate::shim::{Order, Shim};

#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct Args {
    x: u64,
    y: u64,
}

const FAULTS: [&str; 18] = [
    "good",
    "warp_with_sync",
    "read_behind_the_end",
    "write_before_the_start",
    "shared_behind_the_end",
    "read_of_nothing",
    "read_of_nothing_shared",
    "read_before_the_barrier",
    "write_after_others_read",
    "two_write_one",
    "warp_without_sync",
    "blocks_share",
    "barrier_of_some",
    "shuffle_of_some",
    "load_between_bounds",
    "copy_without_wait",
    "copy_read_too_early",
    "copy_without_barrier",
];

#[test]
fn shim_names_each_fault() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels/shim/faults.cu");
    let shim = Shim::compile(&[source]).expect("the kernels compile");
    let mut said = String::new();
    for kernel in FAULTS {
        let blocks = if kernel == "blocks_share" { 2 } else { 1 };
        let run = move |check: &mut glmddp::kernels::check::Check| {
            let values: Vec<u8> = [1f32; 32].iter().flat_map(|v| v.to_le_bytes()).collect();
            let (x, y) = (check.executor.alloc("x", 256)?, check.executor.alloc("y", 256)?);
            check.executor.write(x, &values)?;
            launch(check.executor, kernel, Launch::row(blocks, 64, 256), &Args { x: x.address, y: y.address })?;
            Ok(())
        };
        let result = shim.run(&Case::new("faults", kernel.to_owned(), run), Order::Ascending);
        said += &result.map_or_else(|error| format!("{error}\n"), |_| format!("kernel `{kernel}`: no fault\n"));
    }
    insta::assert_snapshot!(said);
}

#[test]
fn launch_that_a_gpu_would_refuse_is_refused() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels/shim/faults.cu");
    let shim = Shim::compile(&[source]).expect("the kernels compile");
    let refused = |kernel: &'static str, launch_as: Launch, args: &'static [u8]| {
        let run = move |check: &mut glmddp::kernels::check::Check| Ok(check.executor.launch(kernel, launch_as, args)?);
        shim.run(&Case::new("faults", kernel.to_owned(), run), Order::Ascending).unwrap_err().to_string()
    };
    let zeros: &'static [u8] = &[0; 16];
    let all = [
        refused("missing", Launch::row(1, 64, 256), zeros),
        refused("good", Launch::row(1, 128, 256), zeros),
        refused("good", Launch::row(1, 48, 256), zeros),
        refused("good", Launch::row(1, 64, 100 << 10), zeros),
        refused("good", Launch::row(0, 64, 256), zeros),
        refused("good", Launch::row(1, 64, 256), &zeros[..8]),
    ];
    insta::assert_snapshot!(all.join("\n"));
}
