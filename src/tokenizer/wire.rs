//! The protobuf wire format, as far as SentencePiece uses it: reading borrows from the input and allocates nothing.

/// One field's content.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    Varint(u64),
    Fixed32([u8; 4]),
    Fixed64([u8; 8]),
    Bytes(&'a [u8]),
}

/// Where and why a message cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("byte {offset}: {reason}")]
pub(super) struct WireError {
    pub offset: usize,
    pub reason: String,
}

/// Walks over the fields of one message.
pub(super) struct Fields<'a> {
    buf: &'a [u8],
    pos: usize,
    /// Offset of `buf` in the file, for messages.
    base: usize,
}

impl<'a> Fields<'a> {
    pub fn new(buf: &'a [u8], base: usize) -> Self {
        Self { buf, pos: 0, base }
    }

    /// Offset in the file of the next byte.
    pub fn offset(&self) -> usize {
        self.base + self.pos
    }

    /// The next field's number and content, or none at the end.
    ///
    /// # Errors
    /// A cut-off field, a varint of more than 64 bits, field number 0, or a wire type that protobuf no longer has.
    pub fn next_field(&mut self) -> Result<Option<(u32, Value<'a>)>, WireError> {
        if self.pos == self.buf.len() {
            return Ok(None);
        }
        let at = self.offset();
        let key = self.varint()?;
        let number = u32::try_from(key >> 3).ok().filter(|&n| n != 0).ok_or_else(|| error(at, format!("bad field number {}", key >> 3)))?;
        let value = match key & 7 {
            0 => Value::Varint(self.varint()?),
            1 => Value::Fixed64(self.array()?),
            2 => {
                let at = self.offset();
                let len = self.varint()?;
                let left = self.buf.len() - self.pos;
                let len = usize::try_from(len)
                    .ok()
                    .filter(|&len| len <= left)
                    .ok_or_else(|| error(at, format!("field {number} wants {len} bytes, {left} are left")))?;
                Value::Bytes(self.take(len)?)
            }
            5 => Value::Fixed32(self.array()?),
            other => return Err(error(at, format!("field {number} has the unknown wire type {other}"))),
        };
        Ok(Some((number, value)))
    }

    fn varint(&mut self) -> Result<u64, WireError> {
        let at = self.offset();
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = *self.buf.get(self.pos).ok_or_else(|| error(at, "cut off in a number".to_owned()))?;
            self.pos += 1;
            if shift == 63 && byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(error(at, "a number of more than 64 bits".to_owned()))
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let bytes = self.buf[self.pos..].get(..len).ok_or_else(|| error(self.offset(), format!("cut off: {len} bytes wanted")))?;
        self.pos += len;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }
}

fn error(offset: usize, reason: String) -> WireError {
    WireError { offset, reason }
}

/// Writes the fields of one message.
#[derive(Default)]
pub(super) struct Writer {
    buf: Vec<u8>,
}

impl Writer {
    pub fn varint_field(&mut self, number: u32, value: u64) -> &mut Self {
        self.key(number, 0);
        self.varint(value);
        self
    }

    pub fn float_field(&mut self, number: u32, value: f32) -> &mut Self {
        self.key(number, 5);
        self.buf.extend(value.to_le_bytes());
        self
    }

    pub fn bytes_field(&mut self, number: u32, value: &[u8]) -> &mut Self {
        self.key(number, 2);
        self.varint(value.len() as u64);
        self.buf.extend(value);
        self
    }

    pub fn finish(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.buf)
    }

    fn key(&mut self, number: u32, wire_type: u64) {
        self.varint(u64::from(number) << 3 | wire_type);
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.buf.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.buf.push(value as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Vec<(u32, Value<'_>)>, WireError> {
        let mut fields = Fields::new(bytes, 0);
        let mut all = Vec::new();
        while let Some(field) = fields.next_field()? {
            all.push(field);
        }
        Ok(all)
    }

    #[test]
    fn fields_written_are_read_back() {
        let bytes = Writer::default().varint_field(3, u64::MAX).float_field(2, -0.0).bytes_field(300, b"ab").varint_field(1, 0).finish();
        let expected =
            [(3, Value::Varint(u64::MAX)), (2, Value::Fixed32((-0.0f32).to_le_bytes())), (300, Value::Bytes(b"ab")), (1, Value::Varint(0))];
        assert_eq!(read(&bytes).unwrap(), expected);
    }

    #[test]
    fn hostile_fields_are_refused_with_their_offset() {
        for (bytes, offset, reason) in [
            (&[0x08][..], 1, "cut off"),
            (&[0x08, 0x80], 1, "cut off"),
            (&[0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02], 1, "more than 64 bits"),
            (&[0x0a, 0x05, 0x00], 1, "wants 5 bytes, 1 are left"),
            (&[0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01], 1, "are left"),
            (&[0x15, 0, 0, 0], 1, "cut off"),
            (&[0x0b], 0, "wire type 3"),
            (&[0x00, 0x00], 0, "field number 0"),
        ] {
            let error = read(bytes).unwrap_err();
            assert_eq!(error.offset, offset, "{bytes:?}");
            assert!(error.reason.contains(reason), "{bytes:?}: {error}");
        }
    }
}
