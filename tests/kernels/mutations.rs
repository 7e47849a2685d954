//! Planted errors: each must be found by a case.
