//! What once broke a promise: each input, and what is said of it now.

use crate::archive;
use crate::formats::{opened, unpickled};

#[test]
fn tensors_under_one_long_name_cost_the_name_once() {
    unpickled(&archive::repeated_name(100_000, 100_000)).unwrap();
}

#[test]
fn archive_with_two_pickles_is_refused_by_both_names() {
    let pickle = archive::dict_of(&archive::tensor(16, 0, &[4], &[1]));
    let two = archive::zip_of([("a/data.pkl", &pickle[..]), ("b/data.pkl", &pickle[..]), ("a/data/0", &[0; 64]), ("b/data/0", &[1; 64])]);
    let error = opened(two).unwrap_err();
    assert!(error.contains("`a/data.pkl` and `b/data.pkl`"), "{error}");
}
