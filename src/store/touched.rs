//! Finds the keys whose state must be written after a batch of usage records.

use crate::pool::{Key, Workspace};
use crate::proxy::UsageBatch;

/// The workspaces of the keys in the records, by address.
pub(super) struct Touched(Vec<*const Workspace>);

impl Touched {
    pub(super) fn by(sheets: &[UsageBatch]) -> Self {
        let keys = sheets.iter().flat_map(UsageBatch::commons).filter_map(|common| common.key.as_ref());
        let workspaces = keys.map(|key| key.workspace());
        let mut touched: Vec<_> = workspaces.map(std::ptr::from_ref).collect();
        touched.sort_unstable();
        touched.dedup();
        Self(touched)
    }

    pub(super) fn includes(&self, key: &Key) -> bool {
        self.0.binary_search(&std::ptr::from_ref(key.workspace())).is_ok()
    }
}
