//! What once broke a promise: each input, and what is said of it now.

use crate::archive;
use crate::formats::unpickled;

#[test]
fn tensors_under_one_long_name_cost_the_name_once() {
    unpickled(&archive::repeated_name(100_000, 100_000)).unwrap();
}
