//! Pictures that are turned when they are read, and what lies beside them.

use std::io::Cursor;
use std::path::Path;

use dinolab_core::text::printable;
use dinolab_core::{Error, Result};
use image::metadata::Orientation::{self, NoTransforms, Rotate270, Rotate270FlipH, Rotate90, Rotate90FlipH};
use image::{ImageDecoder, ImageFormat, ImageReader};

use super::{content, of_exif, png, webp};

/// Whether the picture in the bytes of a file is turned when it is read, and then whether its sides change places. Files that are no
/// pictures are read by those who want them.
fn turned(bytes: &[u8]) -> Option<Turned> {
    let format = content::format(bytes).ok()?;
    let orientation: Orientation = match format {
        ImageFormat::Png => of_exif(&png::exif(bytes).ok()??),
        ImageFormat::WebP => of_exif(&webp::exif(bytes).ok()??),
        _ => ImageReader::with_format(Cursor::new(bytes), format).into_decoder().ok()?.orientation().ok(),
    }?;
    (orientation != NoTransforms)
        .then_some(Turned { transposes: matches!(orientation, Rotate90 | Rotate90FlipH | Rotate270 | Rotate270FlipH) })
}

/// That a camera noted how a picture is turned (EXIF).
#[derive(Clone, Copy, Debug)]
struct Turned {
    /// Whether width and height change places.
    transposes: bool,
}

/// Fails if the picture in the bytes of the file `image` is turned when it is read, and the `size` of what lies beside it in the file
/// `path` does not show that this is turned too.
///
/// # Errors
/// As said.
pub(crate) fn check_turned(
    bytes: &[u8],
    image: &Path,
    upright: [usize; 2],
    size: [usize; 2],
    path: &Path,
) -> Result<()> {
    let Some(Turned { transposes }) = turned(bytes) else { return Ok(()) };
    if transposes && size[0] != size[1] && size == upright {
        return Ok(());
    }
    let problem = format!(
        "its image {} is turned as its EXIF data says, and nothing shows that this file is turned too",
        printable(image)
    );
    let help = "store the image upright (`magick mogrify -auto-orient`), and this file as one sees the image";
    Err(Error::content(path, problem, help))
}
