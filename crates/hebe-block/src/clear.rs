//! Room of a file or device that is given back, or made zeros. A read that ends
//! meanwhile may interrupt that ([`crate::BlockBackend::open_ring`]).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{Errno, retry_on_intr};

/// Bytes of zeros that are written at a time, where nothing else works.
const CHUNK: usize = 1 << 20;

/// Gives the range back: it reads as zeros afterwards.
///
/// # Errors
/// Of kind `Unsupported` where the host cannot, or not in these pieces.
pub(crate) fn discard(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let holes = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match retry_on_intr(|| fallocate(file, holes, offset, len)) {
        Ok(()) => Ok(()),
        // A device takes whole blocks of its own alone.
        Err(Errno::INVAL) => Err(io::ErrorKind::Unsupported.into()),
        Err(errno) => Err(errno.into()),
    }
}

/// Makes the range zeros; gives it back if it may and can. Where the host has
/// no better way, zeros are written.
pub(crate) fn zero(file: &File, offset: u64, len: u64, may_give_back: bool) -> io::Result<()> {
    if may_give_back && discard(file, offset, len).is_ok() {
        return Ok(());
    }
    let zeros = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    match retry_on_intr(|| fallocate(file, zeros, offset, len)) {
        Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => write_zeros(file, offset, len),
        result => result.map_err(io::Error::from),
    }
}

fn write_zeros(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let chunk = vec![0; CHUNK.min(usize::try_from(len).unwrap_or(CHUNK))];
    let mut done = 0;
    while done < len {
        let piece = (len - done).min(chunk.len() as u64);
        file.write_all_at(&chunk[..piece as usize], offset + done)?;
        done += piece;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_written_where_there_is_no_other_way() {
        let file = tempfile::tempfile().expect("file");
        file.write_all_at(&[7; 3 << 20], 0).expect("write");
        write_zeros(&file, 512, (2 << 20) + 512).expect("zeros");
        let mut bytes = vec![1; 3 << 20];
        file.read_exact_at(&mut bytes, 0).expect("read");
        let inside = 512..(2 << 20) + 1024;
        for (at, byte) in bytes.iter().enumerate() {
            let wanted = if inside.contains(&at) { 0 } else { 7 };
            assert_eq!(*byte, wanted, "{at}");
        }
    }
}
