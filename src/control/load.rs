//! Finds the state directory, loads the configuration before and after a change, and checks that the running server can
//! apply the result. Files outside of the state directory are not read again for a change.

use std::path::PathBuf;

use super::Controller;
use crate::admin::control::ControlError;
use crate::app::{AppConfig, RunningApp};
use crate::config::{self, FileContents, KeyRequirement, LoadedConfig, Overrides, StateDirectory};

impl Controller {
    /// Returns the state directory of the running server, or the configured one without a running server.
    pub(super) fn state_directory(&self) -> Result<Option<StateDirectory>, ControlError> {
        match &self.reloader {
            Some(reloader) => Ok(reloader.state_directory()),
            None => Ok(self.load_current()?.config.state_directory()),
        }
    }

    /// Returns the contents of the files outside of the state directory as they were when the running configuration was
    /// loaded. A change does not apply edits of those files. The next reload applies them.
    pub(super) fn kept_contents(&self, directory: &StateDirectory) -> FileContents {
        let mut contents =
            self.reloader.as_ref().map(|reloader| reloader.contents().clone()).unwrap_or_default();
        contents.forget_below(directory.path());
        contents
    }

    /// Loads the configuration before the change. The configuration may have no key, and no client on an address that
    /// other machines can reach, because the change may add the first one.
    pub(super) fn load_current(&self) -> Result<LoadedConfig, ControlError> {
        let overrides = Overrides {
            key_requirement: KeyRequirement::Optional,
            allows_exposure: true,
            ..self.overrides.clone()
        };
        let directory = self.reloader.as_ref().and_then(|reloader| reloader.state_directory());
        let kept = directory.map(|directory| self.kept_contents(&directory)).unwrap_or_default();
        config::load_with_files(&overrides, &[], &kept)
            .map_err(|problems| ControlError::Invalid(problems.to_string()))
    }

    /// Loads the configuration as it would be with the given paths and contents of `files`, and checks that it can be
    /// applied to `app`. Files in `kept` are not read again.
    pub(super) fn load_next(
        &self,
        files: &[(PathBuf, String)],
        kept: &FileContents,
        app: Option<&RunningApp>,
    ) -> Result<(LoadedConfig, AppConfig), ControlError> {
        let loaded = config::load_with_files(&self.overrides, files, kept)
            .map_err(|problems| ControlError::Invalid(problems.to_string()))?;
        self.check_is_applicable(loaded, app)
    }

    /// Checks that a loaded configuration can be applied to `app`, and converts it into the settings of the modules.
    pub(super) fn check_is_applicable(
        &self,
        loaded: LoadedConfig,
        app: Option<&RunningApp>,
    ) -> Result<(LoadedConfig, AppConfig), ControlError> {
        let invalid = |error: &dyn std::fmt::Display| ControlError::Invalid(error.to_string());
        let app_config = match &self.reloader {
            Some(reloader) => reloader.app_config(&loaded.config),
            None => AppConfig::from_config(loaded.config.clone()),
        };
        let app_config = app_config.map_err(|error| invalid(&error))?;
        if let Some(app) = app {
            app.check_reload(&app_config).map_err(|error| invalid(&error))?;
        }
        Ok((loaded, app_config))
    }
}
