//! Notices what is opened or changed outside of the folder that is read.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use rustix::io::Errno;

/// The kernel's events of `root` and `root/outside`. Linux only, as the program.
pub struct Watch {
    inotify: OwnedFd,
}

impl Watch {
    pub fn new(root: &Path) -> Self {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
        let made = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVE;
        inotify::add_watch(&inotify, root, made).unwrap();
        inotify::add_watch(&inotify, root.join("outside"), made | WatchFlags::OPEN | WatchFlags::ACCESS | WatchFlags::MODIFY).unwrap();
        Self { inotify }
    }

    /// What has happened since the last call.
    pub fn events(&mut self) -> Vec<String> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = Reader::new(&self.inotify, &mut buffer);
        let mut events = Vec::new();
        loop {
            match reader.next() {
                Ok(event) => events.push(format!("{:?} {:?}", event.file_name().unwrap_or_default(), event.events())),
                Err(Errno::WOULDBLOCK) => return events,
                Err(error) => panic!("inotify: {error}"),
            }
        }
    }
}
