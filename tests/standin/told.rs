//! What the stand-in does when it is told to: devices, failures, orders; and what it counts.

use std::path::Path;

use cudarc::driver::DriverError;
use glmddp::kernels::cuda;
use serde_json::Value;

use crate::faults::{libraries, plain_libraries, said};
use crate::libraries::{again, is_inside, text, this_test};
use crate::raw::{BYTES, Raw};

fn code<T>(result: Result<T, DriverError>) -> String {
    result.map_or_else(|error| format!("{:?}", error.0), |_| "fine".to_owned())
}

/// Runs `body` in a process of its own with `variables`; the lines that it printed behind `> `.
fn told(test: &str, libraries: &Path, variables: &[(&str, &str)], body: impl FnOnce() -> Vec<String>) -> Vec<String> {
    if is_inside() {
        println!();
        body().iter().for_each(|line| println!("> {line}"));
        return Vec::new();
    }
    let output = again(test, libraries, variables);
    assert!(output.status.success(), "{}", text(&output));
    text(&output).lines().filter_map(|line| line.strip_prefix("> ")).map(str::to_owned).collect()
}

#[test]
fn call_that_is_told_to_fail_fails_once() {
    let said = told(this_test!(), libraries(), &[("GLMDDP_STANDIN_FAIL", "cuMemAllocAsync:2:2;cuLaunchKernel:1:701")], || {
        let raw = Raw::new();
        let mut codes: Vec<String> = (0..3).map(|_| code(raw.try_alloc(BYTES, raw.a))).collect();
        let both = [raw.filled(1, raw.a), raw.alloc(raw.a)];
        codes.extend((0..2).map(|_| code(raw.launch("good", both, raw.a))));
        codes
    });
    if !is_inside() {
        assert_eq!(said, ["fine", "CUDA_ERROR_OUT_OF_MEMORY", "fine", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "fine"]);
    }
}

/// As after an uncorrectable error of the memory, or a device that fell off its bus.
#[test]
fn device_that_is_lost_answers_no_more() {
    let said = told(this_test!(), libraries(), &[("GLMDDP_STANDIN_FAIL", "cuMemAllocAsync:2:214")], || {
        let raw = Raw::new();
        let x = raw.alloc(raw.a);
        vec![code(raw.try_alloc(BYTES, raw.a)), code(raw.free(x, raw.a)), code(raw.end())]
    });
    if !is_inside() {
        assert_eq!(said, ["CUDA_ERROR_ECC_UNCORRECTABLE"; 3]);
    }
}

#[test]
fn kernel_that_faults_is_noticed_at_the_next_wait() {
    let said = told(this_test!(), plain_libraries(), &[("GLMDDP_STANDIN_FAULT", "good")], || {
        let raw = Raw::new();
        let both = [raw.filled(1, raw.a), raw.alloc(raw.a)];
        vec![code(raw.launch("good", both, raw.a)), code(raw.try_alloc(BYTES, raw.a)), code(raw.end()), code(raw.try_alloc(BYTES, raw.a))]
    });
    if !is_inside() {
        assert_eq!(said, ["fine", "fine", "CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_ILLEGAL_ADDRESS"]);
    }
}

#[test]
fn kernel_that_hangs_holds_up_its_own_stream_alone() {
    let said = told(this_test!(), plain_libraries(), &[("GLMDDP_STANDIN_HANG", "good")], || {
        let raw = Raw::new();
        let both = [raw.filled(1, raw.a), raw.alloc(raw.a)];
        raw.launch("good", both, raw.a).unwrap();
        let event = raw.record(raw.a);
        let mut bytes = [0; BYTES];
        let of_b = raw.filled(2, raw.b);
        let codes = vec![code(raw.down(&mut bytes, of_b, raw.b)), code(raw.query(event))];
        assert_eq!(bytes, [2; BYTES]);
        codes
    });
    if !is_inside() {
        assert_eq!(said, ["fine", "CUDA_ERROR_NOT_READY"]);
    }
}

#[test]
fn devices_are_those_that_are_described() {
    let devices = "NVIDIA GeForce RTX 4090,8.9,24000000000;old one,7.5,1000";
    let said = told(this_test!(), libraries(), &[("GLMDDP_STANDIN_DEVICES", devices)], || {
        let found = cuda::driver().unwrap().devices;
        found.iter().map(|device| format!("{device}: {} bytes", device.memory_bytes)).collect()
    });
    if !is_inside() {
        let expected = [
            "GPU 0 (NVIDIA GeForce RTX 4090, compute capability 8.9): 24000000000 bytes",
            "GPU 1 (old one, compute capability 7.5): 1000 bytes",
        ];
        assert_eq!(said, expected);
    }
}

#[test]
fn memory_of_a_device_is_what_it_has() {
    let said = told(this_test!(), libraries(), &[("GLMDDP_STANDIN_BYTES", "1000")], || {
        let raw = Raw::new();
        let first = raw.try_alloc(600, raw.a);
        let second = raw.try_alloc(600, raw.a);
        let freed = first.and_then(|at| raw.free(at, raw.a));
        vec![code(first), code(second), code(freed), code(raw.try_alloc(600, raw.a))]
    });
    if !is_inside() {
        assert_eq!(said, ["fine", "CUDA_ERROR_OUT_OF_MEMORY", "fine", "fine"]);
    }
}

/// Where nothing orders two streams, what comes out depends on the seed alone.
#[test]
fn order_is_that_of_the_seed() {
    let test = this_test!();
    let of = |seed: &str| {
        told(test, plain_libraries(), &[("GLMDDP_STANDIN_SEED", seed)], || {
            let raw = Raw::new();
            let (x, mut bytes) = (raw.filled(1, raw.a), [0; BYTES]);
            raw.synchronize(raw.a).unwrap();
            raw.fill(x, 2, raw.a);
            raw.fill(x, 3, raw.b);
            raw.end().unwrap();
            raw.down(&mut bytes, x, raw.a).unwrap();
            vec![bytes[0].to_string()]
        })
    };
    if is_inside() {
        of("");
        return;
    }
    let seeds = ["0", "1", "2", "3", "4", "5", "6", "7"];
    let (first, second) = (seeds.map(of), seeds.map(of));
    assert_eq!(first, second, "a seed gives the same order again");
    assert!(first.iter().any(|last| last != &first[0]), "{first:?}");
}

#[test]
fn what_is_asked_for_is_counted_from_wait_to_wait() {
    let folder = tempfile::tempdir().unwrap();
    let body = || {
        let raw = Raw::new();
        let (x, y, pinned, mut bytes) = (raw.filled(1, raw.a), raw.alloc(raw.a), raw.pinned(1), [0; BYTES]);
        raw.up(x, pinned, raw.a).unwrap();
        raw.launch("good", [x, y], raw.a).unwrap();
        raw.launch("good", [x, y], raw.a).unwrap();
        raw.synchronize(raw.a).unwrap();
        raw.up(x, &bytes, raw.a).unwrap();
        raw.copy(y, x, 100, raw.a).unwrap();
        raw.free(y, raw.a).unwrap();
        raw.down(&mut bytes, x, raw.a).unwrap();
        raw.down(pinned, x, raw.a).unwrap();
        raw.free(x, raw.a).unwrap();
        Vec::new()
    };
    told(this_test!(), libraries(), &[("GLMDDP_STANDIN_COUNTS", folder.path().to_str().unwrap())], body);
    if is_inside() {
        return;
    }
    let file = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    let text = std::fs::read_to_string(file).unwrap();
    let of = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        let sum = |key: &str| format!("{key} {} x {}", line[key]["number"], line[key]["bytes"]);
        let keys = ["up_pinned", "up_pageable", "down_pinned", "down_pageable", "on_device", "fills", "allocations"];
        let sums: Vec<String> = keys.into_iter().map(sum).filter(|text| !text.ends_with(" 0 x 0")).collect();
        let (wait, launches) = (line["wait"].as_str().unwrap(), &line["launches"]);
        format!("{wait}: {launches}, {}, {} frees, live {}, peak {}", sums.join(", "), line["frees"], line["live"], line["peak"])
    };
    let expected = [
        "cuStreamSynchronize: {\"good\":2}, up_pinned 1 x 256, fills 1 x 256, allocations 2 x 512, 0 frees, live 512, peak 512",
        "cuMemcpyDtoHAsync_v2: {}, up_pageable 1 x 256, down_pageable 1 x 256, on_device 1 x 100, 1 frees, live 256, peak 512",
        "exit: {}, down_pinned 1 x 256, 1 frees, live 0, peak 256",
    ];
    assert_eq!(text.lines().map(of).collect::<Vec<_>>(), expected);
}

#[test]
fn nothing_is_said_where_nothing_is_wrong() {
    let test = this_test!();
    if is_inside() {
        let raw = Raw::new();
        raw.launch("good", [raw.filled(1, raw.a), raw.alloc(raw.a)], raw.a).unwrap();
        return raw.end().unwrap();
    }
    assert_eq!(said(&text(&again(test, libraries(), &[]))), "nothing");
}
