//! What the host may not do, and what it may: each in a process of its own, since the driver answers no more after a fault.

use cudarc::driver::DriverError;

use crate::faults::{libraries, said};
use crate::libraries::{again, is_inside, text, this_test};
use crate::raw::{BYTES, Raw};

/// Names what a process of its own does.
const NAME: &str = "GLMDDP_TEST_HOST";

type Done = Result<(), DriverError>;
type Host = fn(&Raw) -> Done;

/// Uploads 1s, runs a kernel that reads them on stream a, and gives (x, y).
fn started(raw: &Raw) -> [u64; 2] {
    let (x, y) = (raw.filled(1, raw.a), raw.alloc(raw.a));
    raw.launch("good", [x, y], raw.a).unwrap();
    [x, y]
}

/// As [`started`], and stream b waits for it.
fn started_and_waited_for(raw: &Raw) -> [u64; 2] {
    let both = started(raw);
    raw.wait_for(raw.record(raw.a), raw.b);
    both
}

/// Wrong, by what is wrong.
const WRONG: &[(&str, Host)] = &[
    ("a kernel reads what another stream writes", |raw| {
        let ([_, y], z) = (started(raw), raw.alloc(raw.b));
        raw.launch("good", [y, z], raw.b)?;
        raw.end()
    }),
    ("a kernel writes what another stream reads", |raw| {
        let [x, _] = started(raw);
        let y = raw.filled(2, raw.b);
        raw.launch("good", [y, x], raw.b)?;
        raw.end()
    }),
    ("two streams write the same", |raw| {
        let [x, y] = started_and_waited_for(raw);
        raw.launch("good", [x, y], raw.a)?;
        raw.launch("good", [x, y], raw.b)?;
        raw.end()
    }),
    ("the event is recorded before the kernel", |raw| {
        let (x, y, z) = (raw.filled(1, raw.a), raw.alloc(raw.a), raw.alloc(raw.b));
        let event = raw.record(raw.a);
        raw.launch("good", [x, y], raw.a)?;
        raw.wait_for(event, raw.b);
        raw.launch("good", [y, z], raw.b)?;
        raw.end()
    }),
    ("the event is waited for on the wrong stream", |raw| {
        let ([_, y], z) = (started(raw), raw.alloc(raw.b));
        raw.wait_for(raw.record(raw.a), raw.a);
        raw.launch("good", [y, z], raw.b)?;
        raw.end()
    }),
    ("the wait comes behind the kernel", |raw| {
        let ([_, y], z) = (started(raw), raw.alloc(raw.b));
        raw.launch("good", [y, z], raw.b)?;
        raw.wait_for(raw.record(raw.a), raw.b);
        raw.end()
    }),
    ("memory is freed on another stream while a kernel uses it", |raw| {
        let [_, y] = started(raw);
        raw.free(y, raw.b)?;
        raw.end()
    }),
    ("memory is used on another stream before it is allocated", |raw| {
        let (x, y) = (raw.filled(1, raw.a), raw.alloc(raw.b));
        raw.launch("good", [x, y], raw.a)?;
        raw.end()
    }),
    ("a kernel uses what was freed before it", |raw| {
        let [x, y] = started(raw);
        raw.free(y, raw.a)?;
        raw.launch("good", [x, y], raw.a)?;
        raw.end()
    }),
    ("memory is freed twice", |raw| {
        let [x, _] = started(raw);
        raw.free(x, raw.a)?;
        raw.free(x, raw.a)
    }),
    ("a copy is longer than its memory", |raw| {
        let [x, y] = started(raw);
        raw.copy(y, x, BYTES + 1, raw.a)
    }),
    ("a copy reads what nobody wrote", |raw| {
        let (x, y) = (raw.alloc(raw.a), raw.alloc(raw.a));
        raw.copy(y, x, BYTES, raw.a)?;
        raw.end()
    }),
    ("the host reads what nobody wrote", |raw| {
        let x = raw.alloc(raw.a);
        raw.down(&mut [0; BYTES], x, raw.a)
    }),
    ("a copy to the host does not wait for the kernel", |raw| {
        let [_, y] = started(raw);
        raw.down(&mut [0; BYTES], y, raw.b)
    }),
    ("pinned memory is changed before its copy", |raw| {
        let (x, pinned) = (raw.alloc(raw.a), raw.pinned(1));
        raw.up(x, pinned, raw.a)?;
        pinned[7] = 2;
        raw.end()
    }),
    ("pinned memory is changed behind a wait for another stream", |raw| {
        let (x, pinned) = (raw.alloc(raw.a), raw.pinned(1));
        raw.up(x, pinned, raw.a)?;
        raw.filled(1, raw.b);
        raw.synchronize(raw.b)?;
        pinned[7] = 2;
        raw.end()
    }),
    ("pinned memory is read before its copy is there", |raw| {
        let ([_, y], pinned) = (started(raw), raw.pinned(0));
        raw.down(pinned, y, raw.a)?;
        // SAFETY: it is memory of this process. The compiler must not know better.
        assert_eq!(unsafe { std::ptr::read_volatile(&raw const pinned[9]) }, 1);
        raw.end()
    }),
    ("pinned memory is read behind a wait for another stream", |raw| {
        let ([_, y], pinned) = (started(raw), raw.pinned(0));
        raw.down(pinned, y, raw.a)?;
        raw.filled(1, raw.b);
        raw.synchronize(raw.b)?;
        // SAFETY: as above.
        assert_eq!(unsafe { std::ptr::read_volatile(&raw const pinned[9]) }, 1);
        raw.end()
    }),
    ("pinned memory is freed before its copy", |raw| {
        let (x, pinned) = (raw.alloc(raw.a), raw.pinned(1));
        raw.up(x, pinned, raw.a)?;
        raw.unpin(pinned)
    }),
    ("a thread has no context", |raw| {
        let x = raw.alloc(raw.a) as usize;
        let on = raw.a as usize;
        // SAFETY: the stand-in refuses it.
        let free = move || unsafe { cudarc::driver::result::free_async(x as u64, on as cudarc::driver::sys::CUstream) };
        std::thread::spawn(free).join().unwrap()
    }),
    ("the legacy stream does not wait for streams that have opted out", |raw| {
        let ([_, y], legacy) = (started(raw), std::ptr::null_mut());
        raw.down(&mut [0; BYTES], y, legacy)
    }),
];

/// Right, and nothing is said.
const RIGHT: &[(&str, Host)] = &[
    ("an event orders two streams", |raw| {
        let ([_, y], z) = (started_and_waited_for(raw), raw.alloc(raw.b));
        raw.launch("good", [y, z], raw.b)?;
        raw.free(y, raw.b)?;
        raw.end()
    }),
    ("the host waits between two streams", |raw| {
        let [_, y] = started(raw);
        raw.synchronize(raw.a)?;
        let z = raw.alloc(raw.b);
        raw.launch("good", [y, z], raw.b)?;
        raw.end()
    }),
    ("two streams read the same", |raw| {
        let ([x, _], z) = (started_and_waited_for(raw), raw.alloc(raw.b));
        let y = raw.alloc(raw.a);
        raw.launch("good", [x, y], raw.a)?;
        raw.launch("good", [x, z], raw.b)?;
        raw.end()
    }),
    ("pageable memory is used again at once", |raw| {
        let (x, mut bytes) = (raw.alloc(raw.a), vec![1; BYTES]);
        raw.up(x, &bytes, raw.a)?;
        bytes.fill(2);
        raw.down(&mut bytes, x, raw.a)?;
        assert_eq!(bytes, [1; BYTES], "the copy is there when the call returns");
        raw.end()
    }),
    ("pinned memory is used again behind a wait", |raw| {
        let (x, pinned, back) = (raw.alloc(raw.a), raw.pinned(1), raw.pinned(0));
        raw.up(x, pinned, raw.a)?;
        raw.down(back, x, raw.a)?;
        raw.synchronize(raw.a)?;
        pinned.fill(2);
        assert_eq!(back, [1; BYTES]);
        raw.unpin(pinned)
    }),
    ("a copy to pinned memory is copied on, behind it", |raw| {
        let (x, y, pinned) = (raw.filled(1, raw.a), raw.filled(2, raw.a), raw.pinned(0));
        raw.down(pinned, x, raw.a)?;
        raw.up(y, pinned, raw.a)?;
        let mut bytes = [0; BYTES];
        raw.down(&mut bytes, y, raw.a)?;
        assert_eq!(bytes, [1; BYTES]);
        raw.end()
    }),
    ("freed memory is allocated again", |raw| {
        for _ in 0..100 {
            let [x, y] = started(raw);
            raw.free(x, raw.a)?;
            raw.free(y, raw.a)?;
        }
        raw.end()
    }),
    ("the legacy stream waits for streams that have not opted out, and they for it", |raw| {
        let (blocking, legacy) =
            (cudarc::driver::result::stream::create(cudarc::driver::result::stream::StreamKind::Default)?, std::ptr::null_mut());
        let (x, y) = (raw.filled(1, blocking), raw.alloc(blocking));
        raw.launch("good", [x, y], legacy)?;
        raw.launch("good", [y, x], blocking)?;
        raw.end()
    }),
];

/// What the stand-in says of each, and what the host's last call returned.
fn table(test: &str, hosts: &[(&str, Host)]) -> String {
    if is_inside() {
        let name = std::env::var(NAME).unwrap();
        let raw = Raw::new();
        let (_, host) = hosts.iter().find(|(wrong, _)| *wrong == name).unwrap();
        println!("\nreturned {:?}", host(&raw).map_err(|error| error.0));
        return String::new();
    }
    let of = |name: &str| {
        // The orders that are allowed must not matter.
        let with = |seed: &str| {
            let output = again(test, libraries(), &[(NAME, name), ("GLMDDP_STANDIN_SEED", seed)]);
            let text = text(&output);
            let returned = text.lines().find_map(|line| line.strip_prefix("returned ")).unwrap_or("nothing: the process was ended");
            (returned.to_owned(), said(&text))
        };
        let (first, others) = (with("0"), ["1", "2", "3"].map(with));
        for other in others {
            assert_eq!((other.0, other.1 == "nothing"), (first.0.clone(), first.1 == "nothing"), "{name}: {first:?}, {}", other.1);
        }
        format!("{name}: {}\n  {}", first.0, first.1)
    };
    hosts.iter().map(|(name, _)| of(name)).collect::<Vec<_>>().join("\n")
}

#[test]
fn host_errors_are_named() {
    let table = table(this_test!(), WRONG);
    if !is_inside() {
        insta::assert_snapshot!(table);
    }
}

#[test]
fn host_that_is_right_is_left_alone() {
    let table = table(this_test!(), RIGHT);
    if !is_inside() {
        let all = RIGHT.iter().map(|(name, _)| format!("{name}: Ok(())\n  nothing"));
        assert_eq!(table, all.collect::<Vec<_>>().join("\n"));
    }
}
