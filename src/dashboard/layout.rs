//! The frame of every page: navigation, notice, and content.

use maud::{DOCTYPE, Markup, html};

/// A page of the dashboard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Page {
    Overview,
    Keys,
    /// The details of one key, which `?id=` names.
    Key,
    Live,
    Usage,
    Clients,
    Connect,
    System,
}

impl Page {
    /// The pages in the navigation.
    const NAVIGATION: [Self; 7] =
        [Self::Overview, Self::Keys, Self::Live, Self::Usage, Self::Clients, Self::Connect, Self::System];

    pub(super) fn at(path: &str) -> Option<Self> {
        [Self::Key].into_iter().chain(Self::NAVIGATION).find(|page| page.path() == path)
    }

    /// Returns the path below the dashboard. All pages are at one level, so that links are relative.
    pub(super) fn path(self) -> &'static str {
        match self {
            Self::Overview => "",
            Self::Keys => "keys",
            Self::Key => "key",
            Self::Live => "live",
            Self::Usage => "usage",
            Self::Clients => "clients",
            Self::Connect => "connect",
            Self::System => "system",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Overview => "Overview",
            Self::Keys => "Keys",
            Self::Key => "Key",
            Self::Live => "Live",
            Self::Usage => "Usage",
            Self::Clients => "Clients",
            Self::Connect => "Connect",
            Self::System => "System",
        }
    }

    /// Returns whether the page has a chart.
    fn has_chart(self) -> bool {
        match self {
            Self::Overview | Self::Usage => true,
            Self::Keys | Self::Key | Self::Live | Self::Clients | Self::Connect | Self::System => false,
        }
    }

    /// Returns the page that is marked in the navigation.
    fn section(self) -> Self {
        if self == Self::Key { Self::Keys } else { self }
    }
}

/// A message about the last action.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Notice {
    Done(&'static str),
    Failed(String),
    /// An HTML fragment, such as a new token.
    Content(String),
}

impl Notice {
    /// Returns the message about the action with this code, which a redirect contains.
    pub(super) fn of_done(code: &str) -> Option<Self> {
        Some(Self::Done(match code {
            "paused" => "The key is paused. Its running requests end normally.",
            "resumed" => "The key is in use again.",
            "removed" => "The key is removed.",
            "added" => "The key is added. Its credits are being polled.",
            "revoked" => "The token of the client is no longer valid.",
            "reloaded" => "The configuration files were read again.",
            _ => return None,
        }))
    }

    fn render(&self) -> Markup {
        match self {
            Self::Done(message) => {
                html! { p.notice.ok role="status" { span aria-hidden="true" { "✓ " } (message) } }
            }
            Self::Failed(message) => {
                html! { p.notice.bad role="alert" { span aria-hidden="true" { "✕ " } (message) } }
            }
            Self::Content(content) => html! { div.notice.ok role="status" { (maud::PreEscaped(content)) } },
        }
    }
}

/// Renders a page.
pub(super) fn page(page: Page, notice: Option<&Notice>, content: &Markup) -> Markup {
    let navigation = html! {
        nav aria-label="Pages" {
            ul {
                @for target in Page::NAVIGATION {
                    @let href = if target.path().is_empty() { "./" } else { target.path() };
                    li { a href=(href) aria-current=[(target == page.section()).then_some("page")] { (target.title()) } }
                }
            }
        }
        form method="post" action="logout" { button.quiet type="submit" { "Sign out" } }
    };
    document(
        page.title(),
        page.path(),
        page.has_chart(),
        Some(&navigation),
        &html! {
            @if let Some(notice) = notice { (notice.render()) }
            (content)
        },
    )
}

/// Renders a page without navigation.
pub(super) fn bare_page(title: &str, content: &Markup) -> Markup {
    document(title, "login", false, None, content)
}

fn document(
    title: &str,
    name: &str,
    has_chart: bool,
    navigation: Option<&Markup>,
    content: &Markup,
) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (title) " · Keychoir" }
                link rel="icon" href="assets/icon.svg" type="image/svg+xml";
                link rel="stylesheet" href="assets/app.css";
                @if has_chart {
                    link rel="stylesheet" href="assets/uplot.css";
                    script src="assets/uplot.js" defer {}
                }
                script type="module" src="assets/app.js" {}
            }
            body data-page=(name) {
                a.skip href="#content" { "Skip to content" }
                header {
                    a.brand href="./" { img src="assets/icon.svg" alt="" width="22" height="22"; "Keychoir" }
                    @if let Some(navigation) = navigation { (navigation) }
                }
                main id="content" { (content) }
            }
        }
    }
}
