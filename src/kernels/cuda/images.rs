//! The compiled kernels, as build.rs made them.

/// A source, the kernels that it has, each with the bytes of its argument, and the fat binary of all architectures.
pub struct Image {
    pub source: &'static str,
    pub kernels: &'static [(&'static str, usize)],
    pub bytes: &'static [u8],
}

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// The image that has `kernel`.
pub fn of(kernel: &str) -> Option<&'static Image> {
    IMAGES.iter().find(|image| image.kernels.iter().any(|(name, _)| *name == kernel))
}

/// Of the struct that `kernel` takes.
pub fn argument_bytes(kernel: &str) -> Option<usize> {
    IMAGES.iter().flat_map(|image| image.kernels).find(|(name, _)| *name == kernel).map(|(_, bytes)| *bytes)
}

/// The names of all kernels.
pub fn kernels() -> Vec<&'static str> {
    IMAGES.iter().flat_map(|image| image.kernels).map(|(name, _)| *name).collect()
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
        // RmsNormArgs: six words of 8 bytes, two of 4.
        assert_eq!(argument_bytes("rms_norm_fwd_bf16"), Some(56));
    }
}
