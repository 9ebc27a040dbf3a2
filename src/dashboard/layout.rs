//! Lists the pages of the dashboard, and renders the parts that all pages share: the head, the navigation and the
//! notice about the last action.

use maud::{DOCTYPE, Markup, html};

/// A page of the dashboard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Page {
    Overview,
    Keys,
    /// The details of one key, whose id is the parameter `id` of the query.
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

    /// Returns the page at a path below the dashboard, or `None` for any other path.
    pub(super) fn from_path(path: &str) -> Option<Self> {
        [Self::Key].into_iter().chain(Self::NAVIGATION).find(|page| page.path() == path)
    }

    /// Returns the path below the dashboard. All pages are at one level, so that relative links work on each page.
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

    /// Returns the name of the page in its title and in the navigation.
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

    /// Whether the page contains a chart.
    fn has_chart(self) -> bool {
        match self {
            Self::Overview | Self::Usage => true,
            Self::Keys | Self::Key | Self::Live | Self::Clients | Self::Connect | Self::System => false,
        }
    }

    /// Returns the page that the navigation marks as the current page.
    fn navigation_page(self) -> Self {
        if self == Self::Key { Self::Keys } else { self }
    }
}

/// A message about the last action.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Notice {
    /// The action succeeded, with this message.
    Done(&'static str),
    /// The action failed, with this message.
    Failed(String),
    /// An HTML fragment, such as a new token.
    Content(String),
}

impl Notice {
    /// Returns the notice for the parameter `done` of the query, which the redirect after an action contains.
    pub(super) fn from_code(code: &str) -> Option<Self> {
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

    /// Renders the notice.
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

/// Renders a page with its navigation and a notice.
pub(super) fn render_page(page: Page, notice: Option<&Notice>, content: &Markup) -> Markup {
    let navigation = html! {
        nav aria-label="Pages" {
            ul {
                @for target in Page::NAVIGATION {
                    @let href = if target.path().is_empty() { "./" } else { target.path() };
                    li { a href=(href) aria-current=[(target == page.navigation_page()).then_some("page")] { (target.title()) } }
                }
            }
        }
        form method="post" action="logout" { button.quiet type="submit" { "Sign out" } }
    };
    let chart_files = html! {
        @if page.has_chart() {
            link rel="stylesheet" href="assets/uplot.css";
            script src="assets/uplot.js" defer {}
        }
    };
    render_document(
        page.title(),
        page.path(),
        &chart_files,
        Some(&navigation),
        &html! {
            @if let Some(notice) = notice { (notice.render()) }
            (content)
        },
    )
}

/// Renders a page without navigation, such as the login page.
pub(super) fn render_bare_page(title: &str, content: &Markup) -> Markup {
    render_document(title, "login", &html! {}, None, content)
}

/// Renders a whole document. The script identifies the page by `name`, and `chart_files` links the files that draw
/// charts.
fn render_document(
    title: &str,
    name: &str,
    chart_files: &Markup,
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
                (chart_files)
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
