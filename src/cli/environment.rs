//! What a launcher tells a process before MPI is up.

/// One environment variable, where it is set and valid text.
pub fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// This process's rank among those that a launcher started.
pub fn launched_rank() -> Option<usize> {
    first_number(&["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"])
}

/// Number of processes that a launcher started.
pub fn launched_size() -> Option<usize> {
    first_number(&["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
}

fn first_number(names: &[&str]) -> Option<usize> {
    names.iter().find_map(|name| std::env::var(name).ok()?.parse().ok())
}
