//! The compiled kernels, as build.rs made them.

/// A source, the kernels that it has, and the fat binary of all architectures.
pub struct Image {
    pub source: &'static str,
    pub kernels: &'static [&'static str],
    pub bytes: &'static [u8],
}

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// The image that has `kernel`.
pub fn of(kernel: &str) -> Option<&'static Image> {
    IMAGES.iter().find(|image| image.kernels.contains(&kernel))
}

/// The names of all kernels.
pub fn kernels() -> Vec<&'static str> {
    IMAGES.iter().flat_map(|image| image.kernels).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first word of a fat binary.
    const MAGIC: [u8; 4] = 0xba55_ed50_u32.to_le_bytes();

    #[test]
    fn every_source_is_an_image_and_every_kernel_is_in_one() {
        let sources = std::fs::read_dir("src/kernels").unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut sources: Vec<String> = sources.filter(|name| name.ends_with(".cu")).collect();
        sources.sort();
        assert_eq!(IMAGES.iter().map(|image| image.source).collect::<Vec<_>>(), sources);
        for image in IMAGES {
            assert!(!image.kernels.is_empty() && image.bytes.starts_with(&MAGIC), "{}", image.source);
        }
        let mut names = kernels();
        names.sort_unstable();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all, "two kernels of one name");
        assert_eq!(of("rms_norm_fwd_bf16").map(|image| image.source), Some("rms_norm.cu"));
    }
}
